"""The roofline: its parts are a step's layers, their operations those of the products, and no part
is above the roof it is given.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from conftest import config_dict, mmdit_dict
from PIL import Image

from contextdiff_jax.benchmarks import paired
from contextdiff_jax.benchmarks.tpu import roofline
from contextdiff_jax.benchmarks.tpu.roofline import Part, RooflineBenchmark
from contextdiff_jax.settings import parse


@pytest.fixture(scope="module")
def settings():
    return parse(config_dict(**{"train.batch_size": 2}))


def test_parts_are_the_layers_of_each_level_the_context_and_the_update(settings):
    parts = {part.name: part for part in roofline.parts(settings, 2)}
    assert list(parts) == [
        "resnet 16x16, 8",
        "resnet 8x8, 16",
        "self-attention 8x8, 16",
        "cross-attention 8x8, 16",
        "feed-forward 8x8, 16",
        "context: cross_attention",
        "AdamW, average",
    ]
    for part in parts.values():  # each runs: shapes in, shapes out
        assert jax.tree.leaves(jax.eval_shape(part.call, *part.arguments))


def test_parts_of_a_transformer_are_its_joint_block_and_what_that_is_made_of():
    settings = parse(mmdit_dict(**{"train.batch_size": 2}))
    parts = {part.name.split(",")[0]: part for part in roofline.parts(settings, 2)}
    assert {"joint block", "feed-forward of the picture", "joint attention"} < set(parts)
    assert {"context: joint", "AdamW"} < set(parts)
    for part in parts.values():
        assert jax.tree.leaves(jax.eval_shape(part.call, *part.arguments))


def test_operations_are_those_of_the_products_forward_and_twice_backward(settings):
    part = next(
        part for part in roofline.parts(settings, 2) if part.name.startswith("feed-forward")
    )
    flops = jax.jit(part.call).lower(*part.arguments).cost_analysis()["flops"]
    # 2 x 64 tokens of 16 to 2 x 64 and from 64 to 16.
    products = 3 * 2 * 2 * 64 * (16 * 128 + 64 * 16)
    assert products < flops < 1.5 * products


def test_a_plot_and_rows_of_what_was_measured(settings, tmp_path, monkeypatch):
    product = Part("product 512", lambda x: x @ x, (jax.ShapeDtypeStruct((512, 512), jnp.float32),))
    total = Part("sum 512", lambda x: x.sum(), product.arguments)
    monkeypatch.setattr(roofline, "parts", lambda *_: [product, total])
    monkeypatch.setattr(paired, "_COPIED", 2**12)
    plot = tmp_path / "roof.png"
    result = roofline.run(settings, RooflineBenchmark(plot=str(plot)))
    first, second = result.rows
    assert first["flops"] == pytest.approx(2 * 512**3, rel=0.01) and second[
        "flops"
    ] == pytest.approx(512**2, rel=0.01)
    assert (
        first["bytes"] == pytest.approx(2 * 4 * 512**2, rel=0.01)
        and first["intensity"] > second["intensity"]
    )
    assert first["flops_per_second"] == pytest.approx(first["flops"] / first["seconds"])
    assert "product 512" in result.text and Image.open(plot).size > (500, 300)


def test_a_chip_that_is_not_here_is_predicted(settings, monkeypatch):
    product = Part(
        "product 2048", lambda x: x @ x, (jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16),)
    )
    monkeypatch.setattr(roofline, "parts", lambda *_: [product])
    (row,) = roofline.run(settings, RooflineBenchmark(topology="v5e:2x2")).rows
    assert row["device"].startswith("v5e, predicted") and row["flops"] == pytest.approx(
        2 * 2048**3, rel=0.01
    )
    assert 0.3 * 197e12 < row["flops_per_second"] <= 197e12 and row["roof"] == 197e12
