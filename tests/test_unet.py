"""The UNet against diffusers' torch model with random weights, its file format and its errors."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import UNet2DConditionModel
from flax import nnx

from contextdiff_jax.models.attention import attention
from contextdiff_jax.models.layers import GroupNorm
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.pretrained import load_unet, save_unet
from contextdiff_jax.pretrained.unet import (
    WEIGHTS_FILE,
    unet_state_from_torch,
    unet_state_to_torch,
)

TOLERANCE = 2e-5  # of the output's largest value

TINY = dict(
    in_channels=4,
    out_channels=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=12,
    attention_head_dim=2,
)
XL = dict(
    block_out_channels=(8, 16, 24),
    layers_per_block=2,
    norm_num_groups=4,
    attention_head_dim=(2, 4, 3),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=12,
    transformer_layers_per_block=(1, 2, 3),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=10 + 6 * 6,
    upcast_attention=True,
)
CONFIGS = {
    "sd1": dict(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
    ),
    "sd2": dict(
        block_out_channels=(8, 16, 24),
        layers_per_block=(1, 2, 1),
        norm_num_groups=4,
        attention_head_dim=(2, 4, 6),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        use_linear_projection=True,
    ),
    "xl": XL,
    "options": TINY
    | dict(
        in_channels=3,
        out_channels=6,
        flip_sin_to_cos=False,
        freq_shift=1,
        act_fn="gelu",
        norm_eps=1e-3,
        resnet_time_scale_shift="scale_shift",
        time_embedding_dim=20,
        mid_block_type="UNetMidBlock2D",
        only_cross_attention=True,
    ),
    "no_mid_block": TINY | dict(mid_block_type=None, layers_per_block=(2, 1)),
}


def torch_unet(config: dict) -> UNet2DConditionModel:
    """A torch UNet whose every tensor matters: norms away from the identity, weights larger than
    torch's.
    """
    torch.manual_seed(0)
    model = UNet2DConditionModel(sample_size=16, **config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                center = float("norm" in name and name.endswith("weight"))
                p.copy_(center + 0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * 1.2 / p[0].numel() ** 0.5)
    return model


def inputs(config: dict, size=(8, 16), length=7, batch=2) -> dict:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    values = dict(
        x=normal(batch, *size, config.get("in_channels", 4)),
        t=np.array([3, 871]),
        text_tokens=normal(batch, length, config["cross_attention_dim"]),
    )
    if "addition_embed_type" in config:
        ids = rng.integers(0, 1024, (batch, 6)).astype(np.float32)
        values["added"] = dict(text_embeds=normal(batch, 10), time_ids=ids)
    return values


def run_torch(
    model: UNet2DConditionModel, x, t, text_tokens, text_mask=None, added=None
) -> np.ndarray:
    with torch.no_grad():
        out = model(
            torch.tensor(x).permute(0, 3, 1, 2),
            torch.tensor(t),
            torch.tensor(text_tokens),
            encoder_attention_mask=None if text_mask is None else torch.tensor(text_mask),
            added_cond_kwargs=added and {k: torch.tensor(v) for k, v in added.items()},
        ).sample
    return out.permute(0, 2, 3, 1).numpy()


@nnx.jit
def _forward(unet: UNet, values: dict):
    return unet(**values)


def run(unet: UNet, **values):
    return jax.tree.map(np.asarray, _forward(unet, values))


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < TOLERANCE * max(np.abs(expected).max(), 1.0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """name -> (torch model, its folder, our module), built once each."""
    built = {}

    def get(name: str):
        if name not in built:
            folder = tmp_path_factory.mktemp(name)
            model = torch_unet(CONFIGS[name])
            model.save_pretrained(folder)
            built[name] = model, folder, load_unet(folder)
        return built[name]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_output_equals_diffusers(pairs, name):
    model, _, unet = pairs(name)
    values = inputs(CONFIGS[name])
    expected = run_torch(model, **values)
    assert expected.std() > 0.1  # or the comparison would show nothing
    assert_close(run(unet, **values), expected)


@pytest.mark.parametrize("name, size", [("sd1", (9, 14)), ("xl", (11, 7))])
def test_output_equals_diffusers_at_odd_sizes_with_a_text_mask(pairs, name, size):
    model, _, unet = pairs(name)
    values = inputs(CONFIGS[name], size)
    values["text_mask"] = np.arange(7) < np.array([[4], [7]])
    expected = run_torch(model, **values)
    assert_close(run(unet, **values), expected)
    # The mask and nothing else decides whether a padded token counts.
    values["text_tokens"][0, 4:] += 100.0
    assert_close(run(unet, **values), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_norm_has_the_epsilon_of_diffusers(pairs, name):
    # Compared as numbers: 1e-5 for 1e-6 hardly changes the output of a network with random weights.
    model, _, unet = pairs(name)
    theirs = {path: module.eps for path, module in model.named_modules() if hasattr(module, "eps")}
    ours = {
        ".".join(map(str, path)): getattr(module, "epsilon", None) or module.eps
        for path, module in nnx.iter_modules(unet)
        if isinstance(module, GroupNorm | nnx.LayerNorm)
    }
    assert ours == theirs


def test_one_timestep_serves_the_whole_batch_and_may_be_fractional(pairs):
    model, _, unet = pairs("sd1")
    values = inputs(CONFIGS["sd1"])
    for t in (np.int32(3), np.float32(3.5)):
        assert_close(
            run(unet, **values | dict(t=t)), run_torch(model, **values | dict(t=np.full(2, t)))
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_saving_a_loaded_network_gives_the_same_tensors_bit_for_bit(pairs, tmp_path, name):
    _, folder, unet = pairs(name)
    save_unet(unet, tmp_path)
    before, after = (safetensors.numpy.load_file(f / WEIGHTS_FILE) for f in (folder, tmp_path))
    assert before.keys() == after.keys()
    for tensor in before:
        np.testing.assert_array_equal(before[tensor], after[tensor], err_msg=tensor)
    assert load_unet(tmp_path).config == unet.config


def test_diffusers_reads_a_saved_network(pairs, tmp_path):
    _, _, unet = pairs("xl")
    save_unet(unet, tmp_path)
    values = inputs(XL)
    model = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert_close(run(unet, **values), run_torch(model, **values))


def test_a_new_context_head_starts_at_zero_and_leaves_the_prediction_unchanged(pairs, tmp_path):
    _, folder, unet = pairs("sd1")
    values = inputs(CONFIGS["sd1"])
    with_head = load_unet(folder, new_context_head=nnx.Rngs(0))
    output, context = run(with_head, **values)
    np.testing.assert_array_equal(output, run(unet, **values))
    assert context.shape == values["x"].shape and not context.any()
    kernel = with_head.context_head.conv.kernel
    kernel[...] = jnp.ones_like(kernel[...])
    output, context = run(with_head, **values)
    np.testing.assert_array_equal(output, run(unet, **values))
    assert context.any()
    save_unet(with_head, tmp_path)
    np.testing.assert_array_equal(run(load_unet(tmp_path), **values)[1], context)
    with pytest.raises(ValueError, match="has a context head already"):
        load_unet(tmp_path, new_context_head=nnx.Rngs(0))


def test_a_new_network_predicts_zero_and_every_parameter_gets_a_gradient_after_a_few_steps():
    make = nnx.jit(lambda: UNet(UNetConfig(**TINY, context_head=True), rngs=nnx.Rngs(0)))
    unet, values = make(), inputs(TINY)
    target = jax.random.normal(jax.random.key(0), values["x"].shape)

    def loss(unet, values):
        output, context = unet(**values)
        error = jnp.mean(jnp.square(output - target)) + jnp.mean(jnp.square(context - 2 * target))
        return error, (output, context)

    @nnx.jit
    def step(unet, values):
        value, grads = nnx.value_and_grad(loss, has_aux=True)(unet, values)
        nnx.update(unet, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(unet, nnx.Param), grads))
        return value, grads

    # the zero-initialised layers open one after another
    ((first, outputs), _), *_, ((last, _), grads) = [step(unet, values) for _ in range(4)]
    assert not any(out.any() for out in outputs)
    assert last < first
    dead = [
        path for path, g in nnx.to_flat_state(grads) if not np.abs(np.asarray(g[...])).max() > 0
    ]
    assert not dead


def test_bfloat16_products_keep_float32_outputs_and_parameters(pairs):
    _, folder, unet = pairs("sd2")
    values = inputs(CONFIGS["sd2"])
    half = load_unet(folder, dtype=jnp.bfloat16)
    output, expected = run(half, **values), run(unet, **values)
    assert output.dtype == np.float32
    assert {p.dtype for p in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    assert 0 < np.abs(output - expected).max() < 0.1 * np.abs(expected).max()


def test_group_norm_keeps_its_precision_in_bfloat16_and_matches_torch():
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 12)).astype(np.float32) * 3 + 2
    norm = GroupNorm(12, 4, eps=1e-3)
    norm.scale[...] = jnp.linspace(0.5, 2, 12)
    norm.bias[...] = jnp.linspace(-1, 1, 12)
    args = torch.tensor(np.asarray(norm.scale[...])), torch.tensor(np.asarray(norm.bias[...]))
    expected = torch.nn.functional.group_norm(
        torch.tensor(x).permute(0, 3, 1, 2), 4, *args, eps=1e-3
    )
    np.testing.assert_allclose(
        norm(jnp.asarray(x)), expected.permute(0, 2, 3, 1).numpy(), atol=1e-5
    )
    # 4096 ones summed in bfloat16 would stop at 256: the statistics must not be.
    ones = GroupNorm(1, 1, dtype=jnp.bfloat16)(jnp.ones((1, 64, 64, 1), jnp.bfloat16))
    assert not np.asarray(ones).any()


def test_a_row_without_any_valid_key_attends_uniformly_and_stays_finite():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 3, 2, 4)) for i in range(3))
    out = attention(q, k, v, jnp.array([[False] * 3, [True] * 3]))
    np.testing.assert_allclose(out[0, 0], v[0].mean(0), rtol=1e-5)
    np.testing.assert_allclose(out[1], attention(q, k, v)[1], rtol=1e-6)


def test_tensors_that_do_not_fit_are_all_listed_in_one_line(pairs):
    _, _, unet = pairs("sd1")
    tensors = unet_state_to_torch(unet)
    del tensors["conv_in.weight"]
    tensors["mid_block.attentions.0.extra"] = np.zeros(3, np.float32)
    tensors["conv_out.bias"] = np.zeros(5, np.float32)
    with pytest.raises(ValueError) as error:
        unet_state_from_torch(tensors, unet)
    message = str(error.value)
    assert "\n" not in message and "3 tensors" in message
    assert "conv_in.weight: missing" in message
    assert "mid_block.attentions.0.extra: unknown" in message
    assert "conv_out.bias: shape (5,), the config asks for (4,)" in message


def test_missing_and_damaged_files_are_named(pairs, tmp_path):
    with pytest.raises(ValueError, match="config.json: no such file"):
        load_unet(tmp_path)
    _, folder, _ = pairs("sd1")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="safetensors: no such file"):
        load_unet(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes()[:-100])
    with pytest.raises(ValueError, match="safetensors: truncated"):
        load_unet(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        load_unet(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(down_block_types=("AttnDownBlock2D",)),
            "model.down_block_types='AttnDownBlock2D': unknown",
        ),
        (dict(act_fn="tanh"), "model.act_fn='tanh': unknown; one of silu, swish"),
        (dict(up_block_types=("UpBlock2D",)), "model.up_block_types=.*each of the 2 levels"),
        (
            dict(norm_num_groups=3),
            "model.norm_num_groups=3: must divide model.block_out_channels\\[0\\]=8",
        ),
        (dict(attention_head_dim=3), "model.attention_head_dim=3 .*must divide"),
        (dict(num_attention_heads=(2, 3)), "must divide model.block_out_channels\\[1\\]=16"),
        (
            dict(layers_per_block=(1, 2, 3)),
            "model.layers_per_block=\\(1, 2, 3\\): must be one int, or 2",
        ),
        (dict(addition_embed_type="text_time"), "model.addition_time_embed_dim=None"),
        (
            dict(class_embed_type="timestep"),
            "model.class_embed_type='timestep': not supported; only None",
        ),
        (
            dict(block_out_chanels=[8]),
            "model.block_out_chanels=.*unknown field; nearest: block_out_channels",
        ),
    ],
)
def test_a_config_that_is_not_supported_is_refused_with_field_value_and_what_is_allowed(
    change, message
):
    with pytest.raises(ValueError, match=message) as error:
        UNetConfig.from_dict(TINY | change)
    assert "\n" not in str(error.value)


def test_a_config_survives_json_and_the_heads_override_counts():
    config = UNetConfig(**TINY, num_attention_heads=(4, 8), context_head=True)
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [level.num_heads for level in config.levels()] == [4, 8]


def test_xl_without_its_added_conditions_names_them(pairs):
    _, _, unet = pairs("xl")
    values = inputs(XL)
    values["added"].pop("time_ids")
    with pytest.raises(ValueError, match="added: lacks time_ids"):
        unet(**values)
