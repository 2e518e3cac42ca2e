"""The bundled caption tokenizer: byte-level BPE, lowercased, so any text has tokens, offline.

`tokenizer.json` beside this file (4096 tokens; a Hugging Face `tokenizers` file) was trained on
captions of the `shapes` and emoji data sets and general English text;
`contextdiff_jax.train_tokenizer` trains another one.
"""

from __future__ import annotations

import pathlib
import runpy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from contextdiff_jax.data import folder_tokenizer
from contextdiff_jax.runtime.texts import check_text, read_object

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")  # in the order of their ids
BUNDLED = pathlib.Path(__file__).with_name("tokenizer.json")


class Tokenizer:
    """Captions to arrays of token ids. Picklable, so loader workers can hold it."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Wraps a tokenizer whose ids 0, 1, 2 are `<pad>`, `<bos>`, `<eos>`; ValueError if they are
        not.
        """
        found = tuple(tokenizer.id_to_token(i) for i in range(len(SPECIAL_TOKENS)))
        if found != SPECIAL_TOKENS:
            raise ValueError(f"tokenizer: its first tokens are {found}; must be {SPECIAL_TOKENS}")
        tokenizer.encode_special_tokens = (
            True  # a caption that contains "<eos>" is text, not an end
        )
        self._tokenizer = tokenizer

    def __reduce__(self):
        # `encode_special_tokens` is no part of what the wrapped tokenizer pickles: build anew.
        return _from_json, (self._tokenizer.to_str(),)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._tokenizer.get_vocab_size()

    def encode(
        self, captions: Sequence[str], max_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Token ids and the mask of those that are not padding; L = `max_length`.

        A row is <bos>, the caption's tokens (as many as fit), <eos>, padding. An empty caption is
        <bos>, <eos>.

        Raises:
            ValueError: if `max_length` is below 2, or captions is one string.
        """
        return self.encode_and_cut(captions, max_length)[:2]

    def encode_and_cut(
        self, captions: Sequence[str], max_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"], list[str]]:
        """`encode`'s arrays, and the words that each caption loses; "" where all fit."""
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: must be at least 2 (<bos> and <eos>)")
        if isinstance(captions, str):
            raise ValueError(
                f"captions={captions!r}: must be a sequence of strings, not one string"
            )
        _check(captions)
        ids, room = np.full((len(captions), max_length), PAD, np.int32), max_length - 2
        texts = [" ".join(c.split()) for c in captions]
        encodings, lost = self._tokenizer.encode_batch(texts, add_special_tokens=False), []
        for row, text, encoding in zip(ids, texts, encodings, strict=True):
            kept = [BOS, *encoding.ids[:room], EOS]
            row[: len(kept)] = kept
            fits = len(encoding.ids) <= room
            lost.append("" if fits else folder_tokenizer.from_word(text, encoding.offsets[room][0]))
        return ids, ids != PAD, lost

    def decode(self, ids: Int32[np.ndarray, "B L"]) -> list[str]:
        """The (lowercased) text of each row, without special tokens."""
        return [text.strip() for text in self._tokenizer.decode_batch(np.asarray(ids).tolist())]


def _check(captions: Sequence[str]) -> None:
    """ValueError for a caption that is no text: a tokenizer's own error would not say which."""
    for caption in captions:
        try:
            check_text(caption)
        except ValueError as error:
            raise ValueError(f"caption {ascii(caption)}: {error}") from None


def _from_json(text: str) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(text))


class FolderTokens:
    """transformers' CLIP or T5 `tokenizer` of a folder (a pipeline's `tokenizer/`), with
    `Tokenizer`'s methods. Picklable.
    """

    def __init__(self, folder: str | pathlib.Path):
        """ValueError if the folder holds none."""
        self._folder = str(folder)
        try:
            self.tokenizer = folder_tokenizer.read_folder(folder)
        except ValueError as error:
            raise ValueError(f"tokenizer={error}") from None
        self.kind = "t5" if type(self.tokenizer).__name__.startswith("T5") else "clip"

    def __reduce__(self):
        return FolderTokens, (self._folder,)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return folder_tokenizer.num_ids(self.tokenizer)

    def encode(
        self, captions: Sequence[str], max_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """`Tokenizer.encode` by a model's own tokenizer.

        A caption's tokens (as many as fit) stand between the model's special ones, then padding.
        """
        return self.encode_and_cut(captions, max_length)[:2]

    def encode_and_cut(
        self, captions: Sequence[str], max_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"], list[str]]:
        """`encode`'s arrays, and the words that each caption loses; "" where all fit."""
        captions = list(captions)
        _check(captions)
        rows = self.tokenizer(
            captions, padding="max_length", max_length=max_length, truncation=True
        )
        lost = list(map(folder_tokenizer.cut_text, captions, rows.encodings))
        return np.array(rows.input_ids, np.int32), np.array(rows.attention_mask, bool), lost


class PipelineTokens:
    """The tokenizers of a pipeline with several text encoders (its folders `tokenizer`,
    `tokenizer_2`, `tokenizer_3`), with `Tokenizer`'s methods. Picklable.

    XL's two ids are stacked, [B, 2, L]. Stable Diffusion 3's stand one after the other, [B, N], for
    T5's are not as many as CLIP's: `max_length` counts those of one CLIP and of T5 together.
    """

    def __init__(self, folder: str | pathlib.Path):
        """ValueError if one of them can't be read."""
        self._folder = pathlib.Path(folder)
        self.parts = {name: FolderTokens(self._folder / name) for name in pipeline_parts(folder)}
        self.is_joined = is_joined(folder)
        self.clip_length = clip_length(folder)

    def __reduce__(self):
        return PipelineTokens, (self._folder,)

    def encode(
        self, captions: Sequence[str], max_length: int
    ) -> tuple[Int32[np.ndarray, "B *E N"], Bool[np.ndarray, "B N"]]:
        """Each tokenizer's `FolderTokens.encode`; of stacked ids the first one's mask."""
        return self.encode_and_cut(captions, max_length)[:2]

    def encode_and_cut(
        self, captions: Sequence[str], max_length: int
    ) -> tuple[Int32[np.ndarray, "B *E N"], Bool[np.ndarray, "B N"], list[str]]:
        """`encode`'s arrays, and the words that each caption loses: of which no encoder reads the
        tokens.
        """
        return self.join(self.encode_parts(captions, max_length))

    def length_of(self, part: str, max_length: int) -> int:
        """The tokens of a caption by one of the tokenizers."""
        if not self.is_joined:
            return max_length
        return max_length - self.clip_length if part == "tokenizer_3" else self.clip_length

    def encode_parts(
        self, captions: Sequence[str], max_length: int
    ) -> dict[str, tuple[Int32[np.ndarray, "B _"], Bool[np.ndarray, "B _"], list[str]]]:
        """What each tokenizer gives, by its name."""
        return {
            name: part.encode_and_cut(captions, self.length_of(name, max_length))
            for name, part in self.parts.items()
        }

    def join(
        self,
        parts: Mapping[str, tuple[Int32[np.ndarray, "B _"], Bool[np.ndarray, "B _"], list[str]]],
    ) -> tuple[Int32[np.ndarray, "B *E N"], Bool[np.ndarray, "B N"], list[str]]:
        """One of each, of what `encode_parts` gave."""
        ids, masks, lost = zip(*parts.values(), strict=True)
        if not self.is_joined:
            return np.stack(ids, axis=1), masks[0], lost[0]
        longest = lost[-1] if "tokenizer_3" in parts else lost[0]  # the CLIPs cut alike
        return np.concatenate(ids, axis=1), np.concatenate(masks, axis=1), longest


AnyTokenizer = Tokenizer | FolderTokens | PipelineTokens


def pipeline_parts(folder: str | pathlib.Path) -> list[str]:
    """The tokenizers' folders in a pipeline's, in order; none in another folder."""
    names, index = ("tokenizer", "tokenizer_2", "tokenizer_3"), _index(folder)
    if index is None:
        return [name for name in names if pathlib.Path(folder, name).is_dir()]
    return list(named_parts(index, names))


def named_parts(index: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """Those of a pipeline's parts that its index (model_index.json) has."""
    return tuple(name for name in names if (index.get(name) or [None])[0] is not None)


def is_sd3_class(pipeline: str) -> bool:
    """Whether a pipeline's class, by its name, is one of Stable Diffusion 3's."""
    return pipeline.startswith("StableDiffusion3")


def is_joined(folder: str | pathlib.Path) -> bool:
    """Whether the ids of a pipeline's tokenizers stand one after the other (Stable Diffusion 3)."""
    index = _index(folder)
    if index is None:
        return pathlib.Path(folder, "tokenizer_3").is_dir()
    return is_sd3_class(str(index.get("_class_name")))


def clip_length(folder: str | pathlib.Path) -> int:
    """The tokens of a caption by a pipeline's CLIP tokenizers, as many as the first one says."""
    clips = [name for name in pipeline_parts(folder) if name != "tokenizer_3"]
    longest = folder_tokenizer.CLIP_TOKENS
    return (
        folder_tokenizer.max_length(pathlib.Path(folder, clips[0]), longest) if clips else longest
    )


def _index(folder: str | pathlib.Path) -> dict[str, Any] | None:
    """model_index.json's values, if it is there."""
    path = pathlib.Path(folder, "model_index.json")
    return read_object(path, "a pipeline's index") if path.is_file() else None


def load_tokenizer(path: str | pathlib.Path | None = None) -> AnyTokenizer:
    """Loads a tokenizer file written by `train_tokenizer`, CLIP's or T5's from a folder, or several
    from a pipeline's folder; the bundled one if `path` is None.

    Raises:
        ValueError: if the file is missing or no such tokenizer, in one line.
    """
    path = BUNDLED if path is None else pathlib.Path(path).expanduser()
    if path.is_dir():
        return PipelineTokens(path) if pipeline_parts(path) else FolderTokens(path)
    try:
        return _from_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"tokenizer={path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # `tokenizers` raises bare Exception for a file that it cannot parse
        raise ValueError(f"tokenizer={path}: is not a tokenizer file ({error})") from error


def train_tokenizer(lines: Iterable[str], vocab_size: int = 4096) -> tokenizers.Tokenizer:
    """Trains a lowercased byte-level BPE of exactly `vocab_size` tokens, if the text offers as
    many.

    All 256 bytes are tokens, so nothing is ever unknown.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # A leading space makes a caption's first word the same token as inside of a caption.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


if __name__ == "__main__":  # the first edition's name of the command
    runpy.run_module("contextdiff_jax.train_tokenizer", run_name="__main__", alter_sys=True)
