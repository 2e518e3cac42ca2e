"""The multimodal transformer against diffusers' SD3Transformer2DModel with the same random
weights, and what is ours in it.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from contextdiff_jax.models import joint
from contextdiff_jax.models.attention import attention, joint_attention
from contextdiff_jax.models.layers import linear
from contextdiff_jax.models.mmdit import MMDiT
from contextdiff_jax.models.mmdit_config import MMDiTConfig
from contextdiff_jax.pretrained import load_mmdit, save_mmdit
from contextdiff_jax.pretrained.unet import WEIGHTS_FILE

SIZES = dict(
    sample_size=16,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=4,
    attention_head_dim=8,
    num_attention_heads=4,
    caption_projection_dim=32,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    pos_embed_max_size=12,
)
# Stable Diffusion 3, 3.5 large, 3.5 medium; and layers that alternate
KINDS = {
    "3": {},
    "3.5": {"qk_norm": "rms_norm"},
    "3.5-dual": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "mixed": {"dual_attention_layers": (1, 3), "patch_size": 1, "sample_size": 8},
}
B, L = 2, 7


def inputs(height=16, width=12):
    rng = np.random.default_rng(0)
    shapes = dict(
        x=(B, height, width, 4),
        text=(B, L, SIZES["joint_attention_dim"]),
        pooled=(B, SIZES["pooled_projection_dim"]),
    )
    drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    drawn = {name: jnp.asarray(array) for name, array in drawn.items()}
    return drawn["x"], jnp.array([3.5, 900.0]), drawn["text"], drawn["pooled"]


def random_torch(**changes):
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**SIZES | changes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn_like(p) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 1))
    return model


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer")
    theirs = random_torch(**KINDS[request.param])
    theirs.save_pretrained(folder)
    return folder, theirs, load_mmdit(folder)


def random_ours(**changes):
    network = MMDiT(MMDiTConfig(**SIZES | changes), rngs=nnx.Rngs(0))
    graph, state = nnx.split(network)
    key = jax.random.key(1)
    state = jax.tree.map(lambda a: a + 0.2 * jax.random.normal(key, a.shape), state)
    return nnx.merge(graph, state)


def test_outputs_are_diffusers(pair):
    _, theirs, ours = pair
    x, t, text, pooled = inputs(*((8, 6) if ours.config.patch_size == 1 else (16, 12)))
    with torch.no_grad():
        args = (torch.tensor(np.asarray(a)) for a in (x.transpose(0, 3, 1, 2), text, pooled, t))
        expected = theirs(*args).sample.numpy().transpose(0, 2, 3, 1)
    got = nnx.jit(lambda network, *args: network(*args))(ours, x, t, text, pooled)
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_a_folder_is_written_back_bit_for_bit(pair, tmp_path):
    folder, _, ours = pair
    save_mmdit(ours, tmp_path)
    before, after = (load_file(each / WEIGHTS_FILE) for each in (folder, tmp_path))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    config = json.loads((folder / "config.json").read_text())
    written = json.loads((tmp_path / "config.json").read_text())
    assert {k: v for k, v in config.items() if k != "_diffusers_version"} == written


def test_a_token_that_does_not_count_is_read_by_nobody():
    network = random_ours(qk_norm="rms_norm", dual_attention_layers=(1,))
    x, t, text, pooled = inputs()
    mask = jnp.arange(L) < jnp.array([[L], [4]])
    run = nnx.jit(lambda network, *inputs: network(*inputs))
    changed = jnp.where(mask[..., None], text, 100.0)
    masked = run(network, x, t, text, pooled, mask)
    np.testing.assert_array_equal(masked, run(network, x, t, changed, pooled, mask))
    # short captions in a batch are as alone, without the padding
    alone = run(network, x[1:], t[1:], text[1:, :4], pooled[1:])
    np.testing.assert_allclose(masked[1:], alone, atol=2e-5 * np.abs(alone).max())


@pytest.mark.parametrize("choice", ["tiles", "splash"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_attention_over_both_streams_is_the_plain_one(choice, masked):
    H, D, N = 2, 16, 130
    rng = np.random.default_rng(0)
    picture, text = (
        tuple(jnp.asarray(rng.standard_normal((3, B, H, n, D), np.float32))) for n in (N, L)
    )
    mask = jnp.arange(L) < jnp.array([[L], [3]]) if masked else None
    seen = None if mask is None else jnp.concatenate([jnp.ones((B, N), bool), mask], axis=1)

    def plain(picture, text):
        whole = [jnp.concatenate(pair, axis=2) for pair in zip(picture, text, strict=True)]
        heads_last = (jnp.swapaxes(x, 1, 2) for x in whole)
        return jnp.swapaxes(attention(*heads_last, seen, scale=1.0), 1, 2)

    def ours(picture, text):
        return jnp.concatenate(joint_attention(picture, text, mask, choice=choice), axis=2)

    weight = jnp.asarray(rng.standard_normal((B, H, N + L, D), np.float32))
    results = [
        jax.jit(jax.value_and_grad(lambda *a, f=f: (f(*a) * weight).sum(), argnums=(0, 1)))(
            picture, text
        )
        for f in (plain, ours)
    ]
    for expected, got in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    only, none = joint_attention(picture, text, mask, choice=choice, both=False)
    assert none is None
    np.testing.assert_allclose(only, plain(picture, text)[:, :, :N], rtol=1e-4, atol=1e-4)


def test_a_new_network_returns_zero_and_its_head_does_not_train_the_trunk():
    config = MMDiTConfig(**SIZES | {"context_head": True})
    x, t, text, pooled = inputs()
    out, context = jax.jit(lambda: MMDiT(config, rngs=nnx.Rngs(0))(x, t, text, pooled))()
    assert not out.any() and not context.any() and context.shape == x.shape
    graph, params = nnx.split(random_ours(context_head=True), nnx.Param)
    total = jax.jit(lambda p: nnx.merge(graph, p)(x, t, text, pooled)[1].sum())
    grads = jax.grad(total)(params)
    moved = {path[0] for path, g in nnx.to_flat_state(grads) if g[...].any()}
    assert moved == {"context_head"}


def test_layers_written_out_and_recomputed_are_the_same():
    network = random_ours()
    x, t, text, pooled = inputs()
    graph, params = nnx.split(network)

    def gradient(**attributes):
        def loss(params):
            network = nnx.merge(graph, params)
            for stack in network.stacks:
                for name, value in attributes.items():
                    setattr(stack, name, value)
            return jnp.square(network(x, t, text, pooled)).mean()

        return jax.jit(jax.grad(loss))(params)

    expected = gradient()
    for attributes in ({"unroll": True}, {"remat": "products"}, {"remat": "blocks"}):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
            gradient(**attributes),
            expected,
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"caption_projection_dim": 30}, "caption_projection_dim=30: must be .* 32"),
        (
            {"dual_attention_layers": (4,)},
            "dual_attention_layers=.4,.: layer 4 is none of",
        ),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm': unknown; one of None, rms_norm"),
        ({"pos_embed_max_size": 4}, "pos_embed_max_size=4: must be at least .* 8"),
        ({"attention_head_dim": 9, "num_attention_heads": 1}, "must be a multiple of 4"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, words):
    changes = {"caption_projection_dim": 9} | changes if "multiple" in words else changes
    with pytest.raises(ValueError, match=words):
        MMDiTConfig(**SIZES | changes)


def test_pictures_that_do_not_fit_and_other_positions_are_refused(pair, tmp_path):
    folder, theirs, ours = pair
    x, t, text, pooled = inputs(28, 28)
    with pytest.raises(ValueError, match="pos_embed_max_size=12 is the most"):
        ours(x, t, text, pooled)
    if ours.config.patch_size > 1:
        with pytest.raises(ValueError, match="model.patch_size=2: must divide"):
            ours(x[:, :7], t, text, pooled)
    theirs.pos_embed.pos_embed.mul_(2)
    theirs.save_pretrained(tmp_path)
    theirs.pos_embed.pos_embed.div_(2)
    with pytest.raises(ValueError, match="pos_embed.pos_embed: isn't what its config says"):
        load_mmdit(tmp_path)


def test_a_tpus_products_by_heads_are_the_layers_own(monkeypatch):
    layer = linear(12, 12, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(12.0)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 12), np.float32))
    expected = layer(x).reshape(2, 5, 3, 4).swapaxes(1, 2)
    back = layer(expected.swapaxes(1, 2).reshape(2, 5, 12))
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(joint, "current_target", lambda p=platform: SimpleNamespace(platform=p))
        found = joint.to_heads(layer, x, 3)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(joint.from_heads(layer, found), back, rtol=1e-5, atol=1e-4)
