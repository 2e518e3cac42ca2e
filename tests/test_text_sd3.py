"""Stable Diffusion 3's text: two CLIPs and T5, any of which may be absent, against diffusers."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from flax import nnx
from torch_models import assert_close
from torch_sd3 import PARTS, stable_diffusion_3

from contextdiff_jax.data import load_tokenizer
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.pretrained.pipeline_folder import load_texts

TEXTS = ["a red circle", "red red red red red red red red red red red red"]
T5_LENGTH = 12


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """diffusers' pipeline and its folder."""
    folder = tmp_path_factory.mktemp("sd3")
    pipe = stable_diffusion_3(folder / "words")
    pipe.save_pretrained(folder / "sd")
    return pipe, folder / "sd"


def folder_without(folder, absent, target):
    """The pipeline's folder, its index without some of the text encoders."""
    target.mkdir()
    for part in folder.iterdir():
        if part.is_dir():
            (target / part.name).symlink_to(part)
    index = json.loads((folder / "model_index.json").read_text())
    gone = {name for part in absent for name in (part, part.replace("text_encoder", "tokenizer"))}
    index |= dict.fromkeys(gone, [None, None])
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def captions_of(folder):
    tokens = load_tokenizer(folder)
    length = tokens.clip_length + T5_LENGTH
    ids, mask = tokens.encode(TEXTS, length)
    text = load_texts(folder, length)
    states = nnx.jit(lambda text: text(ids, mask))(text)
    return tokens, Captions(*states)


@pytest.fixture(scope="module")
def embeds(pipe):
    """diffusers' states and pooled text."""
    return encode_prompt(pipe[0])


def encode_prompt(pipe):
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(
            TEXTS, None, None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH
        )
    return states.numpy(), pooled.numpy()


def without(embeds, absent):
    """The states and pooled text with zeros in the place of an absent encoder's: diffusers'
    `encode_prompt` can't do without a CLIP.
    """
    states, pooled = (array.copy() for array in embeds)
    for name, columns in (("text_encoder", slice(0, 16)), ("text_encoder_2", slice(16, 36))):
        if name in absent:
            states[:, :9, columns] = pooled[:, columns] = 0
    if "text_encoder_3" in absent:
        states[:, 9:] = 0
    if set(PARTS[:2]) <= set(absent):  # nothing says how many tokens CLIP would have
        states = np.pad(states[:, 9:], ((0, 0), (77, 0), (0, 0)))
    return states, pooled


@pytest.mark.parametrize(
    "absent",
    [(), PARTS[2:], PARTS[:1], PARTS[1:2], PARTS[:2]],
    ids=lambda absent: " ".join(absent) or "none",
)
def test_states_and_pooled_text_are_diffusers(pipe, embeds, absent, tmp_path):
    folder = folder_without(pipe[1], absent, tmp_path / "sd")
    tokens, captions = captions_of(folder)
    states, pooled = without(embeds, absent)
    assert_close(captions.tokens, states)
    np.testing.assert_allclose(captions.pooled, pooled, atol=2e-5 * np.abs(embeds[1]).max())
    mask, first = np.asarray(captions.mask), tokens.clip_length
    assert mask.shape == states.shape[:2]
    clip, t5 = not set(PARTS[:2]) <= set(absent), PARTS[2] not in absent
    assert mask[:, 0].all() == clip and mask[:, first].all() == t5 and not mask[0].all()
    assert (tokens.parts.keys() == {p.replace("text_encoder", "tokenizer") for p in PARTS}) == (
        not absent
    )


def test_without_t5_diffusers_own_states_are_zeros_as_long_as_t5s(pipe, embeds):
    t5, pipe[0].text_encoder_3 = pipe[0].text_encoder_3, None
    try:
        states, _ = encode_prompt(pipe[0])
    finally:
        pipe[0].text_encoder_3 = t5
    np.testing.assert_array_equal(states, without(embeds, PARTS[2:])[0])


def test_as_many_tokens_as_diffusers_takes_where_nothing_else_is_said(pipe):
    text = load_texts(pipe[1])
    assert text.longest == 9 + 256 and text.clip_length == 9
    with pytest.raises(ValueError, match="9 tokens of text; CLIP's are 9, so that it must be at"):
        load_texts(pipe[1], 9)


def test_ids_stand_one_after_the_other_and_a_caption_loses_what_t5_does(pipe):
    tokens = pickle.loads(pickle.dumps(load_tokenizer(pipe[1])))
    ids, mask, lost = tokens.encode_and_cut(["a red " * 5, "red"], 9 + T5_LENGTH)
    assert ids.shape == mask.shape == (2, 9 + 9 + T5_LENGTH)
    theirs = [
        each(["a red " * 5, "red"], padding="max_length", max_length=length, truncation=True)
        for each, length in (
            (pipe[0].tokenizer, 9),
            (pipe[0].tokenizer_2, 9),
            (pipe[0].tokenizer_3, T5_LENGTH),
        )
    ]
    np.testing.assert_array_equal(ids, np.concatenate([t.input_ids for t in theirs], axis=1))
    assert lost == ["", ""]  # CLIP's 9 tokens are too few, T5's are not
    assert tokens.encode_and_cut(["a red " * 9], 9 + T5_LENGTH)[2][0].startswith("red a red")
