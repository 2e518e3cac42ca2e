"""python launch/emoji_data.py PACKAGES OUT: called by launch/emoji_data.sh.

    OUT/emoji/     images/VENDOR-CODE.png 64x64, metadata_{train,test}.jsonl
    OUT/emoji3d/   stills/CODE.webp 256x256, clips/CODE/{0..7}.png 64x64,
                   metadata_{train,test}.jsonl, edits.jsonl, and a row a frame of people, animals
                   and faces, frames_{train,test}.jsonl

A test set holds combinations of a person and a skin tone that are not in the training set, each of
whose parts is. Which those are, and which moving emoji neither set has, is read from
launch/emoji_split.json.
"""

from __future__ import annotations

import io
import json
import pathlib
import re
import sys
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from PIL import Image

TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium-light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium-dark skin tone",
    "1F3FF": "dark skin tone",
}
VENDORS = {"noto": "google", "twemoji": "twitter"}
FRAMES = 8
# What the frames' rows are of.
TRAINED = ("People & Body", "Animals & Nature", "Smileys & Emotion")
SPLIT = pathlib.Path(__file__).with_name("emoji_split.json")
Row = dict[str, Any]


class Emoji(NamedTuple):
    """An emoji of emoji.json, or one of its variants in a skin tone.

    Attributes:
      code: its code points, the pictures' file name. base: those of the emoji without a tone.
      tones: keys of `TONES`, none without one.
    """

    code: str
    base: str
    name: str
    tones: tuple[str, ...]
    category: str
    subcategory: str

    @property
    def tone(self) -> str | None:
        return " and ".join(TONES[tone] for tone in self.tones) or None

    @property
    def order(self) -> tuple[str, tuple[int, ...]]:
        """The place among the files of all bases, and the tones from light to dark."""
        return f"{self.base}.webp", tuple(map(list(TONES).index, self.tones))


def read_emoji(package: pathlib.Path) -> dict[str, Emoji]:
    """{code: emoji} of a package of emoji-datasource."""
    found = {}
    with tarfile.open(package) as archive:
        entries = json.load(archive.extractfile("package/emoji.json"))
    for entry in entries:
        base = entry["unified"].lower()
        facts = entry["category"], entry["subcategory"]
        variants = entry.get("skin_variations", {}).items()
        codes = {base: (), **{v["unified"].lower(): tuple(k.split("-")) for k, v in variants}}
        for code, tones in codes.items():
            found[code] = Emoji(code, base, entry["name"].lower(), tones, *facts)
    return found


def members(package: pathlib.Path, folder: str) -> Iterator[tuple[str, bytes]]:
    """(name without its ending, content) of the pictures in a package's folder."""
    with tarfile.open(package) as archive:
        for member in archive:
            path = pathlib.PurePosixPath(member.name)
            if str(path.parent) == f"package/{folder}" and path.suffix in (".png", ".webp"):
                yield path.stem, archive.extractfile(member).read()


def on_white(picture: Image.Image) -> Image.Image:
    """The picture on white."""
    ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    ground.alpha_composite(picture)
    return ground.convert("RGB")


def plain_name(emoji: Emoji) -> str:
    """The name without hyphens; of a flag `flag of ...`."""
    name = emoji.name
    if emoji.category == "Flags":
        name = f"flag of {name.replace(' flag', '')}"
    return re.sub(r"[\s-]+", " ", name)


def write_rows(path: pathlib.Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows", flush=True)


def build_drawn(packages: pathlib.Path, out: pathlib.Path, heldout: set[str]) -> None:
    """The set of every emoji in two drawing styles."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[tuple, Row]]] = {"train": [], "test": []}
    for vendor, package in VENDORS.items():
        file = packages / f"emoji-datasource-{package}-16.0.0.tgz"
        emoji = read_emoji(file)
        for code, content in members(file, f"img/{package}/64"):
            one, name = emoji[code], f"images/{vendor}-{code}.png"
            picture = Image.open(io.BytesIO(content)).convert("RGBA")
            on_white(picture).save(out / name, optimize=True)
            words = filter(None, (plain_name(one), one.tone, f"{vendor} style"))
            row = {
                "file_name": name,
                "text": ", ".join(words),
                "name": plain_name(one),
                "skin_tone": one.tone,
                "vendor": vendor,
                "category": one.category,
                "subcategory": one.subcategory,
            }
            rows["test" if code in heldout else "train"].append(((*one.order, vendor), row))
    for split, found in rows.items():
        write_rows(out / f"metadata_{split}.jsonl", [row for _, row in sorted(found, key=first)])


def first(pair: tuple[tuple, Row]) -> tuple:
    return pair[0]


def write_clip(content: bytes, out: pathlib.Path, code: str) -> bool:
    """Writes an animation's first picture and frames at equal distances over its loop; False for a
    picture that doesn't move.
    """
    animation = Image.open(io.BytesIO(content))
    count = getattr(animation, "n_frames", 1)
    if count < FRAMES:
        return False
    (out / "clips" / code).mkdir(parents=True, exist_ok=True)
    for number in range(FRAMES):
        animation.seek(round(number * count / FRAMES))
        frame = animation.convert("RGBA")
        if not number:
            on_white(frame).save(out / "stills" / f"{code}.webp", quality=90)
        small = frame.resize((64, 64), Image.Resampling.LANCZOS)
        on_white(small).save(out / "clips" / code / f"{number}.png", optimize=True)
    return True


def build_moving(
    packages: pathlib.Path, out: pathlib.Path, heldout: set[str], left_out: set[str]
) -> None:
    """The set of animated emoji: people in all five skin tones with the same motion, and all that
    has no tone.
    """
    (out / "stills").mkdir(parents=True, exist_ok=True)
    emoji = read_emoji(packages / "emoji-datasource-google-16.0.0.tgz")
    found = []
    for part in (1, 2, 3, 4):
        file = packages / f"lobehub-fluent-emoji-anim-{part}-1.0.0.tgz"
        for code, content in members(file, "assets"):
            one = emoji.get(code)
            if one is None or one.base in left_out or len(one.tones) > 1:
                continue
            if (one.category == "People & Body") == bool(one.tones):
                if write_clip(content, out, code):
                    found.append(one)
        print(f"{file.name}: {len(found)} clips so far", flush=True)
    found.sort(key=lambda one: one.order)
    train = [one for one in found if one.code not in heldout]
    test = [one for one in found if one.code in heldout]
    for split, some in (("train", train), ("test", test)):
        write_rows(out / f"metadata_{split}.jsonl", [moving_row(one) for one in some])
        rows = [
            {**moving_row(one), "file_name": f"clips/{one.code}/{number}.png"}
            for one in some
            if one.category in TRAINED
            for number in range(FRAMES)
        ]
        write_rows(out / f"frames_{split}.jsonl", rows)
    write_rows(out / "edits.jsonl", edits(train, test))


def moving_row(one: Emoji) -> Row:
    """A clip's row, with its still."""
    row = {
        "file_name": f"stills/{one.code}.webp",
        "text": ", ".join(filter(None, (one.name, one.tone, "3d style"))),
        "name": one.name,
        "vendor": "3d",
        "category": one.category,
        "subcategory": one.subcategory,
        "clip": f"clips/{one.code}",
    }
    return row | ({"skin_tone": one.tone} if one.tones else {})


def edits(train: list[Emoji], test: list[Emoji]) -> list[Row]:
    """Edits whose true answer is known: from a person's trained tones to the one held out."""
    rows = []
    for target in test:
        same = [one for one in train if one.base == target.base]
        for source in sorted(same, key=lambda one: one.tone):
            before, after = moving_row(source), moving_row(target)
            rows.append(
                {
                    "source": before["clip"],
                    "prompt": before["text"],
                    "target": after["clip"],
                    "edit_prompt": after["text"],
                }
            )
    return rows


def main() -> None:
    """Builds both sets."""
    packages, out = map(pathlib.Path, sys.argv[1:])
    split = json.loads(SPLIT.read_text())
    build_drawn(packages, out / "emoji", set(split["emoji"]["heldout"]))
    moving = split["emoji3d"]
    build_moving(packages, out / "emoji3d", set(moving["heldout"]), set(moving["left_out"]))


if __name__ == "__main__":
    main()
