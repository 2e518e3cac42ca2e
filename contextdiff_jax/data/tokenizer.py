"""The bundled caption tokenizer: byte-level BPE, lowercased, so any text has tokens, offline.

`tokenizer.json` beside this file (4096 tokens; a Hugging Face `tokenizers` file) was trained on
captions of the `shapes` and emoji data sets and general English text;
`contextdiff_jax.train_tokenizer` trains another one.
"""

from __future__ import annotations

import pathlib
import runpy
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from contextdiff_jax.data import folder_tokenizer
from contextdiff_jax.runtime.texts import check_text

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
    """transformers' CLIP or T5 tokenizer of a folder (a pipeline's `tokenizer/`), with
    `Tokenizer`'s methods. Picklable.
    """

    def __init__(self, folder: str | pathlib.Path):
        """ValueError if the folder holds none."""
        self._folder = str(folder)
        try:
            self._tokenizer = folder_tokenizer.read_folder(folder)
        except ValueError as error:
            raise ValueError(f"tokenizer={error}") from None
        self.kind = "t5" if type(self._tokenizer).__name__.startswith("T5") else "clip"

    def __reduce__(self):
        return FolderTokens, (self._folder,)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return folder_tokenizer.num_ids(self._tokenizer)

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
        rows = self._tokenizer(
            captions, padding="max_length", max_length=max_length, truncation=True
        )
        lost = list(map(folder_tokenizer.cut_text, captions, rows.encodings))
        return np.array(rows.input_ids, np.int32), np.array(rows.attention_mask, bool), lost


class PipelineTokens:
    """The tokenizers of a pipeline with several text encoders (its folders `tokenizer`,
    `tokenizer_2`), with `Tokenizer`'s methods; ids are [B, E, L]. Picklable.
    """

    def __init__(self, folder: str | pathlib.Path):
        """ValueError if one of them can't be read."""
        self._folder = pathlib.Path(folder)
        self.parts = {name: FolderTokens(self._folder / name) for name in pipeline_parts(folder)}

    def __reduce__(self):
        return PipelineTokens, (self._folder,)

    def encode(
        self, captions: Sequence[str], max_length: int
    ) -> tuple[Int32[np.ndarray, "B E L"], Bool[np.ndarray, "B L"]]:
        """Each tokenizer's `FolderTokens.encode`, and the first one's mask."""
        return self.encode_and_cut(captions, max_length)[:2]

    def encode_and_cut(
        self, captions: Sequence[str], max_length: int
    ) -> tuple[Int32[np.ndarray, "B E L"], Bool[np.ndarray, "B L"], list[str]]:
        """`encode`'s arrays, and the words that each caption loses by the first tokenizer."""
        made = [part.encode_and_cut(captions, max_length) for part in self.parts.values()]
        return np.stack([ids for ids, _, _ in made], axis=1), *made[0][1:]


AnyTokenizer = Tokenizer | FolderTokens | PipelineTokens


def pipeline_parts(folder: str | pathlib.Path) -> list[str]:
    """The tokenizers' folders in a pipeline's, in order; none in another folder."""
    names = ("tokenizer", "tokenizer_2")
    return [name for name in names if pathlib.Path(folder, name).is_dir()]


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
