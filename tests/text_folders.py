"""A text encoder's folder as transformers writes it, damage to its file, and what is said of it."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
import transformers
from torch_models import randomised

WEIGHTS = "model.safetensors"
TENSOR = "text_model.encoder.layers.1.mlp.fc2.weight"


def text_model() -> torch.nn.Module:
    """A tiny text encoder with random weights."""
    config = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
        projection_dim=6,
        eos_token_id=2,
    )
    return randomised(transformers.CLIPTextModelWithProjection(config))


def assert_refused(load, folder, *parts: str) -> None:
    with pytest.raises(ValueError) as error:
        load(folder)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def rewritten(folder, change) -> None:
    """Applies `change` to the tensors of the folder's file."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
