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
from jaxtyping import Array, Float

from contextdiff_jax.editing.settings import CHANGED, DIFFERENCE, EditConfig

CountTokens = Callable[[str], int]


class Alignment(NamedTuple):
    """An alignment of E edit prompts' tokens with the source's, and of what each counts for.

    Attributes:
      mapper: share of each source token's attention that an edit's token takes. keep: 1 where it
          takes it, 0 where the
        token keeps its own. gain: factor of its attention.
      blended: 1 for the tokens of the words inside whose attention the clip may change; row 0 is
          the source's.
    """

    mapper: Float[np.ndarray, "E L L"]
    keep: Float[np.ndarray, "E L"]
    gain: Float[np.ndarray, "E L"]
    blended: Float[np.ndarray, "P L"]


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
    prompt has.
    """
    E = len(edits)
    source, spans = words_of(prompt), token_spans(prompt, count_tokens, length)
    mapper, keep = np.zeros((E, length, length), np.float32), np.zeros((E, length), np.float32)
    gain, blended = np.ones((E, length), np.float32), np.zeros((1 + E, length), np.float32)
    wanted = [] if edit.blend in ("", CHANGED, DIFFERENCE) else words_of(edit.blend)
    _check_words([*wanted, *(word for word, _ in edit.reweight)], [prompt, *edits])
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
            (e + 1, target, target_spans, prompt),
        ):
            own = " ".join(names)
            for i in (
                changed_words(own, other)
                if changed
                else [i for i, w in enumerate(names) if w in wanted]
            ):
                blended[row, places[i]] = 1
    return Alignment(mapper, keep, gain, blended)


def _check_words(words: Sequence[str], prompts: Sequence[str]) -> None:
    known = {word for prompt in prompts for word in words_of(prompt)}
    for word in words:
        if word.lower() not in known:
            raise ValueError(
                f"edit: the word {word!r} is in none of the prompts, so its attention can't be "
                "found"
            )


@dataclasses.dataclass(frozen=True)
class Control:
    """An `AttentionControl` and `ScannedControl` for rows [source, edits ..., then maybe as many of
    guidance's other branch].

    Attributes:
      cross_on: 1 while the source's attention to words is taken.
      self_on: 1 while its attention to frames is.
      self_tokens: grids up to this many tokens.
      maps: collects, a layer (a network of scanned layers) each, where the blended words are looked
          at: [P, F, H, W].
    """

    alignment: Alignment
    cross_on: Float[Array, ""]
    self_on: Float[Array, ""]
    self_tokens: int
    maps: list[tuple[Float[Array, "P F N"], tuple[int, int]]] = dataclasses.field(
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
    ) -> tuple[Float[Array, "R H F N L"], Float[Array, "P F N"]]:
        """`cross`, and where the blended words are looked at."""
        P = len(self.alignment.blended)
        source, edits = weights[:1], weights[1:P]
        taken = jnp.einsum("hfnl,elm->ehfnm", source[0], self.alignment.mapper)
        share = (self.cross_on * self.alignment.keep)[:, None, None, None]  # [E, 1, 1, 1, L]
        edits = (share * taken + (1 - share) * edits) * self.alignment.gain[:, None, None, None]
        rows = jnp.concatenate([source, edits])
        looks = jnp.einsum("phfnl,pl->pfn", rows, self.alignment.blended) / weights.shape[1]
        return jnp.concatenate([rows, weights[P:]]), looks

    def collect(self, looks: Float[Array, "P F N"], grid: tuple[int, int]) -> None:
        """Adds to the maps."""
        self.maps.append((looks, grid))

    def sparse_causal(
        self, weights: Float[Array, "R F H N M"], grid: tuple[int, int]
    ) -> Float[Array, "R F H N M"]:
        """The edits' frames attend as the source's do."""
        P = len(self.alignment.blended)
        if weights.shape[3] > self.self_tokens:
            return weights
        edits = self.self_on * weights[:1] + (1 - self.self_on) * weights[1:P]
        return jnp.concatenate([weights[:1], edits, weights[P:]])

    def mean_map(self, size: tuple[int, int]) -> Float[Array, "P F H W"]:
        """The collected maps at `size`, averaged."""
        total = 0.0
        for maps, grid in self.maps:
            maps = maps.reshape(*maps.shape[:2], *grid)
            total = total + jax.image.resize(maps, (*maps.shape[:2], *size), "linear")
        return total / max(len(self.maps), 1)


def difference_map(estimates: Float[Array, "P F H W C"]) -> Float[Array, "P F H W"]:
    """How far each row's estimate of x0 is from the source's, the mean over channels: blending's
    map where words are not asked.
    """
    return jnp.abs(estimates - estimates[:1]).mean(-1)


def blend_mask(maps: Float[Array, "P F H W"], threshold: float) -> Float[Array, "P F H W 1"]:
    """1 where the source's or the edit's words are looked at, at least `threshold` of each map's
    largest value.
    """
    inside = maps > threshold * maps.max((1, 2, 3), keepdims=True)
    return (inside | inside[:1]).astype(jnp.float32)[..., None]
