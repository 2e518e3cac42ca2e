"""Attention control of the editor: words aligned, rows replaced, the mask of an edit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from contextdiff_jax.editing.attention import Control, align, blend_mask, changed_words
from contextdiff_jax.editing.settings import EditConfig


def count(word: str) -> int:
    return 2 if word == "retriever" else 1


def test_replaced_words_take_the_attention_of_the_word_in_their_place():
    found = align(
        "a grey dog sits", ["a golden retriever sits"], count, 10, EditConfig(control="replace")
    )
    expected = np.zeros((10, 10))
    for source, target, share in (
        (0, 0, 1),
        (1, 1, 1),
        (2, 2, 1),
        (3, 3, 0.5),
        (3, 4, 0.5),
        (4, 5, 1),
    ):
        expected[source, target] = share
    np.testing.assert_array_equal(found.mapper[0], expected)
    assert list(found.keep[0]) == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_refined_words_keep_their_attention_and_the_others_take_the_source_s():
    edit = EditConfig(control="refine", reweight=(("snow", 2.5),), blend="changed")
    found = align(
        "a jeep on a road", ["a jeep on a road with snow", "a red jeep on a road"], count, 10, edit
    )
    assert list(found.keep[0]) == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert list(found.keep[1]) == [1, 1, 0, 1, 1, 1, 1, 0, 0, 0]
    assert found.mapper[1][2, 3] == found.mapper[1][5, 6] == 1  # jeep, road
    assert list(found.gain[0]) == [1, 1, 1, 1, 1, 1, 1, 2.5, 1, 1] and (found.gain[1] == 1).all()
    # of the source's words, of the edits', and of those that are kept
    assert not found.watched[0].any() and not found.watched[2].any()
    assert [list(np.flatnonzero(row)) for row in found.watched[1]] == [[6, 7], [2]]
    assert changed_words("a porsche car drives", "a silver jeep drives") == [1, 2]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(control="replace"), "has 3 words and the clip's prompt 2"),
        (dict(reweight=(("snow", 2.0),)), "'snow' is in none of the prompts"),
        (dict(blend="dog"), "'dog' is in none of the prompts"),
        (dict(keep=("red",)), "edit.keep: the word 'red' isn't in the clip's prompt"),
    ],
)
def test_words_that_cannot_be_aligned_are_one_line(options, words):
    with pytest.raises(ValueError, match=words):
        align("a jeep", ["a red jeep"], count, 10, EditConfig(**options))


def test_a_prompt_beyond_the_text_encoder_is_one_line():
    with pytest.raises(ValueError, match="'e' lies beyond the text encoder's 6 tokens"):
        align("a b c d e", ["a"], count, 6, EditConfig())


def test_the_control_replaces_rows_of_the_batch_and_nothing_of_the_source():
    rng = np.random.default_rng(0)
    found = align(
        "a b",
        ["a c", "d b"],
        count,
        5,
        EditConfig(control="refine", reweight=(("c", 3.0),), blend="c"),
    )
    # Source, two edits, and the other branch.
    weights = jnp.asarray(rng.random((6, 2, 3, 4, 5)), jnp.float32)
    control = Control(found, jnp.float32(1), jnp.float32(1), 4)
    out = control.cross(weights, (2, 2))
    np.testing.assert_array_equal(out[0], weights[0])
    np.testing.assert_array_equal(out[3:], weights[3:])
    np.testing.assert_allclose(out[1][..., :2], weights[0][..., :2], rtol=1e-6)  # the start and "a"
    # "c": new, and weighed.
    np.testing.assert_allclose(out[1][..., 2], 3 * weights[1][..., 2], rtol=1e-6)
    np.testing.assert_allclose(out[2][..., 2], weights[0][..., 2], rtol=1e-6)  # "b"
    np.testing.assert_allclose(
        control.mean_map((2, 2))[2].reshape(3, 4), 3 * weights[1][..., 2].mean(0), rtol=1e-5
    )
    selves = jnp.asarray(rng.random((3, 6, 2, 4, 8)), jnp.float32)  # a frame's clips
    out = control.sparse_causal(selves, (2, 2))
    for row, source in enumerate((0, 0, 0, 3, 4, 5)):
        np.testing.assert_array_equal(out[:, row], selves[:, source])
    np.testing.assert_array_equal(Control(found, 1.0, 0.0, 4).sparse_causal(selves, (2, 2)), selves)
    np.testing.assert_array_equal(Control(found, 1.0, 1.0, 3).sparse_causal(selves, (2, 2)), selves)
    np.testing.assert_allclose(
        Control(align("a", ["b"], count, 5, EditConfig()), 0.0, 0.0, 0).cross(weights[:2], (2, 2)),
        weights[:2],
        rtol=1e-6,
    )


def test_the_mask_is_that_of_the_source_s_and_of_the_edit_s_words():
    maps = np.zeros((6, 1, 2, 3), np.float32)  # of two edits: the source's, their own, what is kept
    maps[0, 0, 0], maps[2, 0, 1], maps[1, 0, 0] = [1, 0.2, 0], [0, 0, 4], [1, 0.2, 0]

    def mask(**options):
        return blend_mask(jnp.asarray(maps), EditConfig(**options))[:, 0, ..., 0].tolist()

    assert mask(blend="a", blend_threshold=0.3)[0] == [[1, 0, 0], [0, 0, 1]]
    assert mask(blend="a", blend_threshold=0.1)[1] == [[1, 1, 0], [0, 0, 0]]
    maps[4:] = [[[2, 0, 0], [0, 1, 3]]]
    kept = dict(keep=("a",), keep_threshold=0.5)
    assert mask(**kept) == [[[0, 1, 1], [1, 1, 0]]] * 2  # the complement of the words' attention
    assert mask(blend="a", blend_threshold=0.1, **kept)[0] == [[0, 1, 0], [0, 0, 0]]


def test_an_edit_is_controlled_and_watched_as_it_is_alone():
    edit = EditConfig(control="refine", blend="changed", keep=("b",))
    weights = np.random.default_rng(0).random((3, 2, 3, 4, 5)).astype(np.float32)
    turned_on = jnp.asarray([1.0, 0.0])

    def by(prompts, rows, on):
        control = Control(align("a b", prompts, count, 5, edit), on, on, 4)
        changed = control.cross(jnp.asarray(weights[rows]), (2, 2))
        selves = jnp.asarray(np.moveaxis(weights[rows], 2, 0))
        selves = control.sparse_causal(selves, (2, 2)).swapaxes(0, 1)
        return changed, selves, control.mean_map((2, 2))

    both = by(["a c", "d b"], [0, 1, 2], turned_on)
    for i, prompt in enumerate(["a c", "d b"]):
        alone = by([prompt], [0, 1 + i], turned_on[i])
        for found, wanted in zip(both[:2], alone[:2], strict=True):
            np.testing.assert_array_equal(found[1 + i], wanted[1])
        np.testing.assert_array_equal(both[2][i::2], alone[2])
    assert both[2][-1].any()
