"""LoRA (Hu et al., 2021) as parameters beside the model's.

They lie in `params["lora"]`, under the path of the backbone's layer: W + down @ up, with down
[I, R] and up [R, O], up 0 at the start. So the model starts unchanged, and nothing but `merge_lora`
knows of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from contextdiff_jax.models.mmdit import MMDiT
from contextdiff_jax.models.unet import UNet

LORA = "lora"
_NETWORKS = (UNet.name, MMDiT.name)
_LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out")


def add_lora(params: nnx.State, rank: int, key: PRNGKeyArray) -> nnx.State:
    """`params` with LoRA's for every attention projection of the backbone."""
    flat = list(nnx.to_flat_state(params))
    added = []
    for path, kernel in flat:
        if path[0] in _NETWORKS and path[-1] == "kernel" and path[-2] in _LORA_LAYERS:
            *layers, inputs, outputs = kernel.shape
            down = (
                jax.random.normal(jax.random.fold_in(key, len(added)), (*layers, inputs, rank))
                / inputs**0.5
            )
            layer = (LORA, *path[1:-1])
            added += [
                ((*layer, "down"), nnx.Param(down)),
                ((*layer, "up"), nnx.Param(jnp.zeros((*layers, rank, outputs)))),
            ]
    if not added:
        raise ValueError("train.trainable='lora': the network has no attention layers to change")
    return nnx.from_flat_state(flat + added)


def lora_layers(params: nnx.State) -> dict[tuple, tuple[jax.Array, jax.Array]]:
    """Path of a backbone's layer -> (down [*layers, I, R], up [*layers, R, O])."""
    flat = {
        path[1:]: leaf.get_value() for path, leaf in nnx.to_flat_state(params) if path[0] == LORA
    }
    return {
        path[:-1]: (down, flat[(*path[:-1], "up")])
        for path, down in flat.items()
        if path[-1] == "down"
    }


def merge_lora(params: nnx.State) -> nnx.State:
    """The model's parameters: LoRA's products added to the kernels. Without LoRA `params` as they
    are.
    """
    layers = lora_layers(params)
    if not layers:
        return params
    flat = {path: leaf for path, leaf in nnx.to_flat_state(params) if path[0] != LORA}
    (network,) = {path[0] for path in flat if path[0] in _NETWORKS}
    for layer, (down, up) in layers.items():
        path = (network, *layer, "kernel")
        flat[path] = flat[path].replace(flat[path].get_value() + down @ up)
    return nnx.from_flat_state(flat.items())
