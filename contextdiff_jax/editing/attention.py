"""Prompt-to-prompt attention control (Hertz et al., 2022) for clips: replace, refine, re-weight,
injection, masks.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from contextdiff_jax.editing.settings import CHANGED, DIFFERENCE, EditConfig

CountTokens = Callable[[str], int]


class Alignment(NamedTuple):
    """An alignment of E edit prompts' tokens with the source's, and of what each counts for.

    Attributes:
      mapper: share of each source token's attention that an edit's token takes. keep: 1 where it
          takes it, 0 where the
        token keeps its own. gain: factor of its attention.
      watched: 1 for the tokens of words whose attention is collected, for each edit: the source's
          and the edit's, inside whose attention the clip may change, and the source's, inside
          whose attention it stays.
    """

    mapper: Float[np.ndarray, "E L L"]
    keep: Float[np.ndarray, "E L"]
    gain: Float[np.ndarray, "E L"]
    watched: Float[np.ndarray, "3 E L"]


def words_of(prompt: str) -> list[str]:
    """The words of a prompt, as alignment counts them."""
    return prompt.lower().split()


def token_spans(prompt: str, count_tokens: CountTokens, length: int) -> list[range]:
    """Places of each word's tokens, after the first special one.

    Raises ValueError for a prompt longer than the text encoder.
    """
    spans, end = [], 1
    for word in words_of(prompt):
        start, end = end, end + count_tokens(word)
        if end >= length:
            raise ValueError(
                f"prompt={prompt!r}: {word!r} lies beyond the text encoder's {length} tokens; "
                "shorten it"
            )
        spans.append(range(start, end))
    return spans


def _matching(source: list[str], target: list[str], control: str) -> list[tuple[int, int]]:
    """Pairs of words that share their attention."""
    if control == "replace":
        if len(source) != len(target):
            raise ValueError(
                f"edit.control='replace': {' '.join(target)!r} has {len(target)} words and the "
                f"clip's prompt {len(source)}, so they can't be aligned; use "
                "edit.control='refine', or as many words"
            )
        return list(zip(range(len(source)), range(len(target)), strict=True))
    blocks = difflib.SequenceMatcher(None, source, target, autojunk=False).get_matching_blocks()
    return [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]


def changed_words(prompt: str, other: str) -> list[int]:
    """The words of `prompt` that are not, in their order, those of `other`."""
    words = words_of(prompt)
    same = {b for _, b in _matching(words_of(other), words, "refine")}
    return [i for i in range(len(words)) if i not in same]


def align(
    prompt: str, edits: Sequence[str], count_tokens: CountTokens, length: int, edit: EditConfig
) -> Alignment:
    """The alignment that `edit` asks for, `length` tokens wide.

    Raises ValueError, one line: a prompt that is too long or can't be aligned, a word that no
    prompt has, or that is to be kept and isn't in the clip's.
    """
    E = len(edits)
    source, spans = words_of(prompt), token_spans(prompt, count_tokens, length)
    mapper, keep = np.zeros((E, length, length), np.float32), np.zeros((E, length), np.float32)
    gain, watched = np.ones((E, length), np.float32), np.zeros((3, E, length), np.float32)
    wanted = [] if edit.blend in ("", CHANGED, DIFFERENCE) else words_of(edit.blend)
    _check_words([*wanted, *(word for word, _ in edit.reweight)], [prompt, *edits])
    kept = [word.lower() for word in edit.keep]
    _check_words(kept, [prompt], "edit.keep", "the clip's prompt")
    for e, text in enumerate(edits):
        target, target_spans = words_of(text), token_spans(text, count_tokens, length)
        if edit.control != "none":
            for a, b in _matching(source, target, edit.control):
                for token in target_spans[b]:
                    mapper[e, spans[a], token] = 1 / len(target_spans[b])
                    keep[e, token] = 1
            mapper[e, 0, 0] = keep[e, 0] = 1  # the start token
        for word, factor in edit.reweight:
            for i in (i for i, other in enumerate(target) if other == word.lower()):
                gain[e, target_spans[i]] = factor
        changed = edit.blend == CHANGED
        for row, names, places, other in (
            (0, source, spans, text),
            (1, target, target_spans, prompt),
        ):
            own = " ".join(names)
            for i in changed_words(own, other) if changed else _places(names, wanted):
                watched[row, e, places[i]] = 1
        for i in _places(source, kept):
            watched[2, e, spans[i]] = 1
    return Alignment(mapper, keep, gain, watched)


def _places(words: Sequence[str], wanted: Sequence[str]) -> list[int]:
    return [i for i, word in enumerate(words) if word in wanted]


def _check_words(
    words: Sequence[str],
    prompts: Sequence[str],
    field: str = "edit",
    where: str = "none of the prompts",
) -> None:
    known = {word for prompt in prompts for word in words_of(prompt)}
    for word in words:
        if word.lower() not in known:
            found = f"is in {where}" if where.startswith("none") else f"isn't in {where}"
            raise ValueError(f"{field}: the word {word!r} {found}, so its attention can't be found")


@dataclasses.dataclass(frozen=True)
class Control:
    """An `AttentionControl` and `ScannedControl` for rows [source, edits ..., then maybe as many of
    guidance's other branch].

    Attributes:
      cross_on: 1 while the source's attention to words is taken, for each edit or all.
      self_on: 1 while its attention to frames is, for each edit or all.
      self_tokens: grids up to this many tokens.
      maps: collects, a layer (a network of scanned layers) each, where the watched words are looked
          at: the three of `Alignment.watched` in turn, an edit each.
    """

    alignment: Alignment
    cross_on: Float[ArrayLike, "*E"]
    self_on: Float[ArrayLike, "*E"]
    self_tokens: int
    maps: list[tuple[Float[Array, "M F N"], tuple[int, int]]] = dataclasses.field(
        default_factory=list
    )

    def cross(
        self, weights: Float[Array, "R H F N L"], grid: tuple[int, int]
    ) -> Float[Array, "R H F N L"]:
        """Words that are aligned take the source's attention; then factors."""
        weights, looks = self.changed(weights)
        self.collect(looks, grid)
        return weights

    def changed(
        self, weights: Float[Array, "R H F N L"]
    ) -> tuple[Float[Array, "R H F N L"], Float[Array, "M F N"]]:
        """`cross`, and where the watched words are looked at."""
        P = 1 + len(self.alignment.keep)
        source, edits = weights[:1], weights[1:P]
        taken = jnp.einsum("hfnl,elm->ehfnm", source[0], self.alignment.mapper)
        share = _a_row(self.cross_on, 2) * self.alignment.keep
        share = share[:, None, None, None]  # [E, 1, 1, 1, L]
        edits = (share * taken + (1 - share) * edits) * self.alignment.gain[:, None, None, None]
        of_source, of_edits, kept = self.alignment.watched
        looks = [
            jnp.einsum("hfnl,el->efn", source[0], of_source),
            jnp.einsum("ehfnl,el->efn", edits, of_edits),
            jnp.einsum("hfnl,el->efn", source[0], kept),
        ]
        looks = jnp.concatenate(looks) / weights.shape[1]
        return jnp.concatenate([source, edits, weights[P:]]), looks

    def collect(self, looks: Float[Array, "M F N"], grid: tuple[int, int]) -> None:
        """Adds to the maps."""
        self.maps.append((looks, grid))

    def changes_frames(self, tokens: int) -> bool:
        """Grids up to `self_tokens`."""
        return tokens <= self.self_tokens

    def sparse_causal(
        self, weights: Float[Array, "F R H N M"], grid: tuple[int, int]
    ) -> Float[Array, "F R H N M"]:
        """The edits' frames attend as the source's do."""
        P = 1 + len(self.alignment.keep)
        if not self.changes_frames(weights.shape[3]):
            return weights
        source, edits, rest = jnp.split(weights, [1, P], axis=1)
        share = _a_row(self.self_on, 4)
        return jnp.concatenate([source, share * source + (1 - share) * edits, rest], axis=1)

    def mean_map(self, size: tuple[int, int]) -> Float[Array, "M F H W"]:
        """The collected maps at `size`, averaged."""
        total = 0.0
        for maps, grid in self.maps:
            maps = maps.reshape(*maps.shape[:2], *grid)
            total = total + jax.image.resize(maps, (*maps.shape[:2], *size), "linear")
        return total / max(len(self.maps), 1)


def _a_row(values: Float[ArrayLike, "*E"], rank: int) -> Float[Array, "..."]:
    """One for each row of an array of that rank; a number is for all."""
    return jnp.reshape(jnp.asarray(values), (-1, *[1] * (rank - 1)))


def difference_map(estimates: Float[Array, "P F H W C"]) -> Float[Array, "E F H W"]:
    """How far each edit's estimate of x0 is from the source's, the mean over channels: blending's
    map where words are not asked.
    """
    return jnp.abs(estimates[1:] - estimates[:1]).mean(-1)


def blend_mask(maps: Float[Array, "M F H W"], edit: EditConfig) -> Float[Array, "E F H W 1"]:
    """1 where each edit may differ from the source; `maps`: as `Control` collects them.

    With `edit.blend` that is where the source's or the edit's words are looked at, at least
    `blend_threshold` of each map's largest value. Not where the source's words of `edit.keep` are,
    at least `keep_threshold` of it.
    """
    source, own, kept = jnp.split(maps, 3)
    may = jnp.ones(own.shape, bool)
    if edit.blend:
        may = _inside(source, edit.blend_threshold) | _inside(own, edit.blend_threshold)
    if edit.keep:
        may &= ~_inside(kept, edit.keep_threshold)
    return may.astype(jnp.float32)[..., None]


def _inside(maps: Float[Array, "E F H W"], threshold: float) -> Bool[Array, "E F H W"]:
    return maps > threshold * maps.max((1, 2, 3), keepdims=True)
