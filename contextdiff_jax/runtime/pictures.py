"""Pictures for a person to look at.

There are grids of captioned pictures, PNGs that know how they were made, and training curves.
"""

from __future__ import annotations

import io
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from contextdiff_jax.runtime.files import read_lines, replacing

_CELL, _GAP, _FONT_SIZE = 128, 12, 12


def caption_font() -> ImageFont.FreeTypeFont:
    """The font of captions."""
    import matplotlib  # only for the font that it bundles; seconds to import

    return ImageFont.truetype(
        str(pathlib.Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), _FONT_SIZE
    )


def caption_grid(
    images: UInt8[np.ndarray, "N H W 3"],
    captions: Sequence[str],
    columns: int = 4,
    scale: int | None = None,
) -> Image.Image:
    """Pictures in rows of `columns`, each with its caption under it, on white.

    `scale` enlarges by whole pixels (None: to at least 128 pixels wide). ValueError if the counts
    differ or are 0.
    """
    if len(images) != len(captions) or not len(images):
        raise ValueError(
            f"caption_grid: {len(images)} pictures and {len(captions)} captions; must be equal, "
            "not 0"
        )
    height, width = images.shape[1:3]
    scale = scale or max(1, -(-_CELL // width))
    cell = max(width * scale, _CELL)
    wrapped = ["\n".join(textwrap.wrap(c, max(8, cell // 7)) or [""]) for c in captions]
    font, line = caption_font(), _FONT_SIZE + 4
    columns = min(columns, len(images))
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    heights = [
        height * scale + line * max(wrapped[i].count("\n") + 1 for i in row) + 2 * _GAP
        for row in rows
    ]
    grid = Image.new("RGB", (columns * (cell + _GAP) + _GAP, sum(heights) + _GAP), "white")
    draw, y = ImageDraw.Draw(grid), _GAP
    for row, row_height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = _GAP + column * (cell + _GAP)
            picture = Image.fromarray(images[i]).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            grid.paste(picture, (x, y))
            draw.multiline_text(
                (x, y + height * scale + 4), wrapped[i], fill=(30, 30, 30), font=font
            )
        y += row_height
    return grid


def encode_png(image: UInt8[np.ndarray, "H W 3"], metadata: Mapping[str, Any]) -> bytes:
    """Return a PNG with `metadata` in its text chunks."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for name, value in metadata.items():
        info.add_itxt(name, str(value))
    Image.fromarray(image).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def save_png(
    image: UInt8[np.ndarray, "H W 3"], path: str | pathlib.Path, metadata: Mapping[str, Any]
) -> None:
    """Writes a PNG with `metadata` in its text chunks."""
    pathlib.Path(path).write_bytes(encode_png(image, metadata))


def save_each(
    images: UInt8[np.ndarray, "N H W 3"],
    prompts: Sequence[str],
    folder: pathlib.Path,
    made: Mapping[str, Any],
) -> None:
    """Writes each picture alone, with its prompt, its number and what it was made by."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        save_png(image, folder / f"{i:04d}.png", {"prompt": prompt, "index": i, **made})


def read_png_metadata(path: str | pathlib.Path) -> dict[str, str]:
    """The text chunks of a PNG."""
    with Image.open(path) as image:
        return {str(name): str(value) for name, value in image.text.items()}


PANELS = {
    "loss": ("loss",),
    "loss by quartile of t (q1: least noise)": ("loss_q1", "loss_q2", "loss_q3", "loss_q4"),
    "context gain": ("context_gain",),
    "context head's loss": ("context_loss",),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
}
_LOG_PANELS = ("loss", "loss by quartile of t (q1: least noise)")


def plot_curves(metrics: str | pathlib.Path, out: str | pathlib.Path) -> None:
    """Draws the curves of a metrics.jsonl into a PNG; a panel whose metrics are absent or all 0 is
    left out.
    """
    from matplotlib.figure import Figure  # seconds to import

    rows = read_lines(pathlib.Path(metrics))
    panels = {
        title: keys
        for title, keys in PANELS.items()
        if any(row.get(key) for row in rows for key in keys)
    }
    if not panels:
        return
    columns = min(3, len(panels))
    rows_of_panels = -(-len(panels) // columns)
    figure = Figure(figsize=(4.5 * columns, 3 * rows_of_panels))
    axes = figure.subplots(rows_of_panels, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, keys) in zip(axes.flat, panels.items(), strict=False):
        for key in keys:
            points = np.array([(row["step"], row[key]) for row in rows if key in row])
            if not len(points):
                continue
            smooth = _smoothed(points[:, 1])
            line = axis.plot(points[:, 0], smooth, label=key if len(keys) > 1 else None)[0]
            if key.startswith("loss"):
                axis.plot(points[:, 0], points[:, 1], color=line.get_color(), alpha=0.25)
        axis.set(title=title, xlabel="step", yscale="log" if title in _LOG_PANELS else "linear")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(fontsize=8)
    figure.tight_layout()
    with replacing(pathlib.Path(out)) as file:
        figure.savefig(file, dpi=100, format="png")


def _smoothed(values: np.ndarray, window: int = 5) -> np.ndarray:
    """Running mean over up to `window` points, shorter at the ends."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
