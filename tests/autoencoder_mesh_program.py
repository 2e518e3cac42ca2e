"""Prints, as JSON, the loss and the gradient's norm of an autoencoder's first step on one device,
and on eight that share examples, rows and channels.

    python tests/autoencoder_mesh_program.py
"""

import json

import jax
import numpy as np
from autoencoder_settings import autoencoder_settings

from contextdiff_jax.parallel.mesh import Feed, MeshConfig, make_mesh, state_shardings
from contextdiff_jax.training.autoencoder import init_state, make_vae_step


def main() -> None:
    """The same step on both meshes."""
    autoencoder = autoencoder_settings()
    start = jax.device_get(init_state(autoencoder))
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)

    def first_step(shape: MeshConfig, devices: list[jax.Device]) -> list[float]:
        mesh = make_mesh(shape, devices=devices)
        shardings = state_shardings(mesh, start)
        batch = {"image": jax.device_put(images, Feed(mesh, 4).sharding(images.shape))}
        step = jax.jit(make_vae_step(autoencoder, mesh), out_shardings=shardings)
        sums = step(jax.device_put(start, shardings), batch).metric_sums
        return [float(sums[name]) for name in ("loss", "grad_norm")]

    one = first_step(MeshConfig(), jax.devices()[:1])
    many = first_step(MeshConfig(data=2, sequence=2, tensor=2), jax.devices())
    print(json.dumps({"devices": jax.device_count(), "one": one, "many": many}))


if __name__ == "__main__":
    main()
