"""LPIPS against torch's own operations with the same random weights, PickScore against
transformers, and files that don't fit.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch.nn import functional as F
from torch_models import clip_model

from contextdiff_jax.editing.end_to_end import Edited, Judges, measure
from contextdiff_jax.editing.settings import Output
from contextdiff_jax.evaluation.edit_scores import make_pick_scorer
from contextdiff_jax.evaluation.networks.clip import load_clip
from contextdiff_jax.evaluation.networks.lpips import load_lpips

# torchvision's AlexNet
CONVOLUTIONS = [
    (0, 3, 64, 11),
    (3, 64, 192, 5),
    (6, 192, 384, 3),
    (8, 384, 256, 3),
    (10, 256, 256, 3),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    rng, tensors = np.random.default_rng(0), {}
    for i, (number, inputs, outputs, side) in enumerate(CONVOLUTIONS):
        scale = np.sqrt(2 / (inputs * side**2))
        tensors[f"net.slice{i + 1}.{number}.weight"] = (
            rng.normal(size=(outputs, inputs, side, side)) * scale
        )
        tensors[f"net.slice{i + 1}.{number}.bias"] = 0.1 * rng.normal(size=outputs)
        tensors[f"lin{i}.model.1.weight"] = rng.uniform(size=(1, outputs, 1, 1))
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path, tensors


def pictures(seed, height=41, width=64):
    return np.random.default_rng(seed).integers(0, 256, (2, height, width, 3)).astype(np.uint8)


def theirs(tensors, a, b):
    """The package's forward pass (lpips 0.1.4), written with torch's functions."""
    shift, scale = (
        torch.tensor(v)[None, :, None, None]
        for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])
    )
    t = {name: torch.tensor(array) for name, array in tensors.items()}
    found = []
    for x in (a, b):
        h, features = (torch.tensor(x).permute(0, 3, 1, 2) / 127.5 - 1 - shift) / scale, []
        for i, (number, *_) in enumerate(CONVOLUTIONS):
            h = F.max_pool2d(h, 3, 2) if number in (3, 6) else h
            stride, padding = (4, 2) if i == 0 else (1, 2 if i == 1 else 1)
            name = f"net.slice{i + 1}.{number}"
            h = F.relu(F.conv2d(h, t[f"{name}.weight"], t[f"{name}.bias"], stride, padding))
            features.append(h / (h.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        found.append(features)
    layers = [
        F.conv2d((x - y) ** 2, t[f"lin{i}.model.1.weight"])
        for i, (x, y) in enumerate(zip(*found, strict=True))
    ]
    maps = sum(
        F.interpolate(layer, a.shape[1:3], mode="bilinear", align_corners=False) for layer in layers
    )
    return sum(layer.mean((1, 2, 3)) for layer in layers).numpy(), maps[:, 0].numpy()


def test_lpips_and_its_map_are_torchs(weights):
    path, tensors = weights
    a, b = pictures(0), pictures(1)
    values, maps = load_lpips(path, 41, 64)(a, b)
    expected, expected_maps = theirs(tensors, a, b)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    np.testing.assert_allclose(maps, expected_maps, rtol=1e-3, atol=1e-4)
    assert (load_lpips(path, 41, 64)(a, a)[0] == 0).all() and values.min() > 0.1


def test_pickscore_is_transformers_clip_scaled(tmp_path):
    model, processor = clip_model(tmp_path, image_size=20)
    network, clip, prompt = load_clip(tmp_path), pictures(2, 20, 20), "a red circle"
    pixels = torch.tensor(network.preprocessing(clip)).permute(0, 3, 1, 2)
    ids = processor.tokenizer(
        [prompt], padding="max_length", max_length=9, truncation=True
    ).input_ids
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids), pixel_values=pixels)
    np.testing.assert_allclose(
        make_pick_scorer(tmp_path)(clip, prompt)["pickscore"],
        out.logits_per_image.mean().item(),
        rtol=1e-4,
    )


def test_an_edits_row_has_them_all_and_the_backgrounds(weights):
    distance = load_lpips(weights[0], 41, 64)
    source, edit, inside = pictures(3), pictures(4), np.zeros((2, 41, 64), bool)
    inside[:, :20] = True
    edited = Edited(
        reconstruction=source,
        error=0.0,
        outputs=[Output(0, "b", 1.0, None)],
        clips=[edit],
        masks=[inside],
        maps=np.zeros((2, 2, 41, 64)),
    )
    settings = SimpleNamespace(video=SimpleNamespace(prompt="a"))
    judges = Judges(
        (lambda clip, prompt: {"text_alignment": 1.0}, lambda clip, prompt: {"pickscore": 2.0}),
        distance,
    )
    metrics = measure(source, edited, settings, judges)
    (row,), (values, maps) = metrics["edits"], distance(edit, source)
    assert row["lpips"] == pytest.approx(values.mean()) and row[
        "background_lpips"
    ] == pytest.approx(maps[:, 20:].mean())
    assert (
        row["text_alignment"] == 1
        and row["pickscore"] == 2
        and metrics["reconstruction"]["lpips"] == 0
    )
    assert "background_lpips" not in metrics["reconstruction"]


def test_files_and_sizes_that_do_not_fit_are_one_line(weights, tmp_path):
    path, tensors = weights
    with pytest.raises(ValueError, match="pictures of 30 x 64 pixels; it needs 31 a side"):
        load_lpips(path, 30, 64)
    with pytest.raises(ValueError, match="no such file"):
        load_lpips(tmp_path / "gone", 64, 64)
    (tmp_path / "pickle").write_bytes(b"pickle" * 9)
    with pytest.raises(ValueError, match="not safetensors"):
        load_lpips(tmp_path / "pickle", 64, 64)
    short = {name: array for name, array in tensors.items() if name != "lin4.model.1.weight"}
    short["lin0.model.1.weight"] = short["lin0.model.1.weight"][:, :9]
    safetensors.numpy.save_file(
        {n: np.ascontiguousarray(a) for n, a in short.items()}, tmp_path / "short.safetensors"
    )
    with pytest.raises(
        ValueError,
        match=r"lin0.model.1.weight is \(1, 9, 1, 1\), not \(1, 64, 1, 1\); lin4.* is missing",
    ):
        load_lpips(tmp_path / "short.safetensors", 64, 64)
