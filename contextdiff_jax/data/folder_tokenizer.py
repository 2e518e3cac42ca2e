"""CLIP's and T5's tokenizers of a folder, of whatever version of transformers wrote it, and what a
text loses where it is cut.

transformers builds a stub with the special tokens alone where the vocabulary is missing, and reads
any vocabulary as the class that it is told. So the files are looked at first: they must be there,
be readable, and be of the kind that the text encoder reads.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import logging
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

from contextdiff_jax.runtime.errors import one_line
from contextdiff_jax.runtime.texts import read_content, read_object

LOGGER = logging.getLogger(__name__)
CONFIG_FILE = "tokenizer_config.json"
_OTHER_FILES = ("special_tokens_map.json", "added_tokens.json")
CLIP_TOKENS = 77  # of a text, where the folder doesn't say
_KINDS = {"clip": "CLIP", "t5": "T5"}
_CLASSES = {
    "CLIPTokenizer": "clip",
    "CLIPTokenizerFast": "clip",
    "T5Tokenizer": "t5",
    "T5TokenizerFast": "t5",
}
# Classes that say nothing about the model: its files must.
_ANY_MODEL = (None, "", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
_VOCABULARY = "tokenizer.json, or vocab.json and merges.txt (CLIP), or spiece.model (T5)"
_OBJECT = "a tokenizer's"


def read_folder(folder: str | Path, kind: str | None = None) -> Any:
    """transformers' tokenizer of a folder (a pipeline's `tokenizer/`); transformers is imported
    here and nowhere else.

    Args:
      kind: `clip` or `t5`, what the text encoder reads; None: whichever the files are of.

    Raises ValueError, one line with folder and file, if the vocabulary is missing or damaged, or of
    another kind.
    """
    folder = Path(folder)
    found = _vocabulary_kind(folder)
    max_length(folder, 2)  # refuses what is no length
    if kind is None:
        _check_class(folder, found)
    elif kind != found:
        raise ValueError(
            f"{folder}: the tokenizer is {_KINDS[found]}'s; the text encoder reads {_KINDS[kind]}'s"
        )
    from transformers import CLIPTokenizer, T5Tokenizer  # seconds

    make = {"clip": CLIPTokenizer, "t5": T5Tokenizer}[found]
    try:
        with _without_marks(folder) as readable:
            tokenizer = make.from_pretrained(str(readable), **_t5_options(folder, found))
    except Exception as error:  # of many kinds; `tokenizers` raises bare Exception
        raise ValueError(
            f"{folder}: {CONFIG_FILE} and the vocabulary can't be read together ({one_line(error)})"
        ) from None
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{folder / CONFIG_FILE}: pad_token=None: must be a token")
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """The values of tokenizer_config.json, {} without the file. ValueError for a damaged one."""
    path = folder / CONFIG_FILE
    return read_object(path, _OBJECT) if path.is_file() else {}


def max_length(folder: Path, longest: int) -> int:
    """The tokens of a text: as many as the folder's tokenizer says, of at most `longest`.

    Raises ValueError for a number that leaves no room between the special tokens.
    """
    config = read_config(folder)
    length = config.get("model_max_length") or config.get("max_len") or longest
    if not isinstance(length, int | float) or length < 2:
        raise ValueError(
            f"{folder / CONFIG_FILE}: model_max_length={length!r}: must be a number of at least 2"
        )
    return int(min(length, longest))


def num_ids(tokenizer: Any) -> int:
    """One more than the largest id that transformers' tokenizer gives."""
    return max(tokenizer.get_vocab().values()) + 1


def check_ids(
    ids: Int[np.ndarray, "B L"], texts: Sequence[str], tokenizer: Any, rows: int, where: str
) -> None:
    """Raises ValueError if an id of the texts has no row in the encoder's embedding of `rows`."""
    for text, row in zip(texts, ids, strict=True):
        if (row >= rows).any():
            number = int(row[row >= rows][0])
            token = tokenizer.convert_ids_to_tokens(number)
            raise ValueError(
                f"{where}: token {token!r} of {text!r} has the id {number}; the text encoder's "
                f"embedding has rows for 0..{rows - 1}; take the encoder that was saved with it"
            )


def cut_text(text: str, encoding: tokenizers.Encoding) -> str:
    """The end of `text`, from the first word of which a token was cut off; empty if all fitted."""
    if not encoding.overflowing:
        return ""
    rest = encoding.overflowing[0]
    starts = [
        start
        for (start, _), special in zip(rest.offsets, rest.special_tokens_mask, strict=True)
        if not special
    ]
    return from_word(text, starts[0]) if starts else ""


def from_word(text: str, start: int) -> str:
    """`text` from the beginning of the word that the character `start` is in."""
    while start < len(text) and text[start].isspace():
        start += 1
    while start and not text[start - 1].isspace():
        start -= 1
    return text[start:]


def warn_of_cut(
    texts: Sequence[str], lost: Sequence[str], length: int, what: str = "prompt", shown: int = 3
) -> None:
    """Logs which words of the first `shown` texts are lost at the encoder's `length`, and how many
    more texts are cut.
    """
    cut = {text: words for text, words in zip(texts, lost, strict=True) if words}
    for text, words in list(cut.items())[:shown]:
        start = textwrap.shorten(text, 60, placeholder="...")
        LOGGER.warning("%s %r is cut at %d tokens; lost: %r", what, start, length, words)
    if len(cut) > shown:
        LOGGER.warning("%d of %d %ss are cut at %d tokens", len(cut), len(texts), what, length)


@dataclasses.dataclass
class CutCaptions:
    """Counts a data set's captions that are longer than `length` tokens, and names the first."""

    length: int
    count: int = 0
    _named: bool = False

    def add(self, captions: Sequence[str], lost: Sequence[str]) -> None:
        """Counts those that lose words; `lost` is empty if nothing was encoded."""
        cut = [(caption, words) for caption, words in zip(captions, lost, strict=False) if words]
        self.count += len(cut)
        if cut and not self._named:
            caption, words = cut[0]
            warn_of_cut([caption], [words], self.length, "caption")
            self._named = True


def _vocabulary_kind(folder: Path) -> str:
    """`clip` or `t5`, by the vocabulary's model."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a tokenizer's files")
    for name in (CONFIG_FILE, *_OTHER_FILES):
        if (folder / name).is_file():
            read_object(folder / name, _OBJECT)
    if (folder / "tokenizer.json").is_file():
        return _fast_kind(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() or (folder / "merges.txt").is_file():
        return _slow_kind(folder)
    if (folder / "spiece.model").is_file():
        return _sentencepiece_kind(folder / "spiece.model")
    raise ValueError(f"{folder}: holds no tokenizer's vocabulary; expected {_VOCABULARY}")


def _check_class(folder: Path, kind: str) -> None:
    """The class must not gainsay the vocabulary, where no encoder says which is right."""
    name = read_config(folder).get("tokenizer_class")
    if name not in _ANY_MODEL and _CLASSES.get(str(name)) != kind:
        raise ValueError(
            f"{folder / CONFIG_FILE}: tokenizer_class={name!r}: the vocabulary is "
            f"{_KINDS[kind]}'s; must be {_KINDS[kind]}Tokenizer, or absent"
        )


def _fast_kind(path: Path) -> str:
    """The kind of the model that a tokenizer.json describes."""
    model = read_object(path, _OBJECT).get("model")
    if not isinstance(model, dict) or not model.get("vocab"):
        raise ValueError(f"{path}: holds no vocabulary; expected {_VOCABULARY}")
    # Old files don't name the model: only BPE has merges, only Unigram a list with scores.
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram")
    is_clip = kind == "BPE" and model.get("end_of_word_suffix") == "</w>"
    is_t5 = kind == "Unigram" and model.get("unk_id", 2) == 2  # as T5Tokenizer has it
    if not (is_clip or is_t5):
        raise ValueError(
            f"{path}: model.type={kind!r}: another model's; must be CLIP's, BPE with "
            "end_of_word_suffix='</w>', or T5's, Unigram with unk_id=2"
        )
    with _without_marks(path.parent) as readable:
        try:
            tokenizers.Tokenizer.from_file(str(readable / path.name))
        except Exception as error:  # `tokenizers` raises nothing finer
            raise ValueError(f"{path}: not a tokenizer file ({one_line(error)})") from None
    return "t5" if is_t5 else "clip"


def _slow_kind(folder: Path) -> str:
    """The kind of vocab.json and merges.txt, which many models have: CLIP's words end with </w>."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (vocab, merges):
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected {_VOCABULARY}")
    values = read_object(vocab, _OBJECT)
    if not values or not all(type(number) is int for number in values.values()):
        raise ValueError(f"{vocab}: must map tokens to ids, whole numbers")
    if not any(token.endswith("</w>") for token in values):
        raise ValueError(f"{vocab}: another model's; no token of it ends with </w>, as CLIP's do")
    read_content(merges, _VOCABULARY)
    with _without_marks(folder) as readable:
        try:
            tokenizers.models.BPE.from_file(str(readable / vocab.name), str(readable / merges.name))
        except Exception as error:  # `tokenizers` raises nothing finer
            raise ValueError(f"{merges}: doesn't fit {vocab.name} ({one_line(error)})") from None
    return "clip"


def _sentencepiece_kind(path: Path) -> str:
    read_content(path, _VOCABULARY)
    try:
        import sentencepiece  # noqa: F401  (transformers reads the file with it)
    except ImportError:
        raise ValueError(
            f"{path}: can't be read without a package; pip install sentencepiece, or add the "
            "tokenizer.json that transformers.T5Tokenizer.save_pretrained writes where it is there"
        ) from None
    return "t5"


def _t5_options(folder: Path, kind: str) -> dict[str, int]:
    """T5Tokenizer's `extra_ids`, if only the vocabulary says how many there are: by default it adds
    a hundred, whose ids an encoder may not have.
    """
    config, path = read_config(folder), folder / "tokenizer.json"
    lists = (config.get(f"{name}_special_tokens") for name in ("additional", "extra"))
    told = "extra_ids" in config or any(lists)
    if kind != "t5" or told or not path.is_file():
        return {}
    vocabulary = read_object(path, _OBJECT)["model"]["vocab"]
    return {"extra_ids": sum(str(token).startswith("<extra_id_") for token, *_ in vocabulary)}


@contextlib.contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """The folder, or a copy of its tokenizer's files without the byte order marks that Windows'
    editors write: transformers can't read them.
    """
    names = (CONFIG_FILE, *_OTHER_FILES, "tokenizer.json", "vocab.json", "merges.txt")
    contents = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if not any(content.startswith(codecs.BOM_UTF8) for content in contents.values()):
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        for name, content in contents.items():
            (Path(copy) / name).write_bytes(content.removeprefix(codecs.BOM_UTF8))
        yield Path(copy)
