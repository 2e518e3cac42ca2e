"""What the comparisons with torch's models share: random weights that matter, and one tolerance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

TOLERANCE = 2e-5  # of the output's largest value

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
diffusers_logging.disable_progress_bar()


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """`model` with weights whose every tensor matters: norms away from the identity, the others about unit gain."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim <= 1:
                p.copy_(float("norm" in name and name.endswith("weight")) + 0.3 * noise)
            elif "embed" in name or "bias" in name or "shared" in name:
                p.copy_(noise)
            else:
                p.copy_(noise * 1.2 / p[0].numel() ** 0.5)
    return model.eval()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_close(actual, expected) -> None:
    """Equal within TOLERANCE of the largest value, and not vacuously so."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert expected.std() > 0.05
    assert np.abs(actual - expected).max() < TOLERANCE * max(np.abs(expected).max(), 1.0)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, by torch (which has every float type)."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def assert_same_tensors(folder: Path, other: Path) -> None:
    """The same names, types and bits."""
    before, after = stored(folder), stored(other)
    assert before.keys() == after.keys() and before
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        bits = torch.int16 if tensor.element_size() == 2 else torch.int32
        assert torch.equal(tensor.view(bits), after[name].view(bits)), name


def edit_config(folder: Path, **changes) -> None:
    """Changes fields of config.json; None removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
