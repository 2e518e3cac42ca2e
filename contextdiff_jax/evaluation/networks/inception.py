"""Inception-v3 as FID uses it: the 2015-12-05 TensorFlow graph's 2048 pooled features, in NNX,
NHWC.

Topology: Szegedy et al. 2016 with the graph's own quirks, known from its torch ports: average pools
    leave the
padding out of their count, and the last block (`Mixed_7c`) pools by maximum.

Weights: the ports' checkpoint `pt_inception-2015-12-05-6726825d.pth` as safetensors, under its own
    names. A pickle is
not read: it can run code. Batch normalisation is folded into the convolutions when they are loaded.

Pictures: uint8 -> [-1, 1], resized to 299 x 299 bilinearly, half-pixel centres, no antialiasing:
    pytorch-fid's choice.
TensorFlow 1's own resize (torch-fidelity, torchmetrics) aligns corners at 0 and clean-fid
antialiases with PIL's
bicubic: figures of different resizes don't compare, and small pictures are mostly resize. See
    docs/evaluation.md.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Float, UInt8

from contextdiff_jax.models.pixels import to_unit

SIZE = 299
WIDTH = 2048
_BN_EPS = 1e-3
_UNUSED = ("fc.", "AuxLogits.")  # the classifier on top of the features
TO_SAFETENSORS = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "save_file(torch.load(sys.argv[1], map_location='cpu', weights_only=True), sys.argv[2])\" "
    "FILE.pth FILE.safetensors"
)


class ConvReLU(nnx.Conv):
    """Convolution, bias (of the folded batch normalisation), ReLU. `padding` is on both sides, as
    in torch.
    """

    def __init__(
        self,
        features_in: int,
        features: int,
        kernel=(1, 1),
        stride: int = 1,
        padding=(0, 0),
        *,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            features_in,
            features,
            kernel,
            strides=(stride, stride),
            padding=tuple((p, p) for p in padding),
            rngs=rngs,
        )

    def __call__(self, x):
        return jax.nn.relu(super().__call__(x))


def _max_pool(x, stride, padding):
    return nnx.max_pool(x, (3, 3), (stride, stride), padding)


def _average_pool(x):
    return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


class _Block(nnx.Module):
    """Convolutions by the checkpoint's names: those of stride 1 keep the size, those of stride 2
    are not padded.
    """

    def _add(self, name, features_in, features, kernel=(1, 1), stride=1, *, rngs):
        padding = tuple(k // 2 for k in kernel) if stride == 1 else (0, 0)
        setattr(self, name, ConvReLU(features_in, features, kernel, stride, padding, rngs=rngs))

    def _chain(self, x, *names):
        for name in names:
            x = getattr(self, name)(x)
        return x


class MixedA(_Block):
    """35 x 35: 1x1, 5x5, double 3x3, average pool."""

    def __init__(self, features_in: int, pool: int, *, rngs: nnx.Rngs):
        self._add("branch1x1", features_in, 64, rngs=rngs)
        self._add("branch5x5_1", features_in, 48, rngs=rngs)
        self._add("branch5x5_2", 48, 64, (5, 5), rngs=rngs)
        self._add("branch3x3dbl_1", features_in, 64, rngs=rngs)
        self._add("branch3x3dbl_2", 64, 96, (3, 3), rngs=rngs)
        self._add("branch3x3dbl_3", 96, 96, (3, 3), rngs=rngs)
        self._add("branch_pool", features_in, pool, rngs=rngs)

    def __call__(self, x):
        return jnp.concatenate(
            [
                self.branch1x1(x),
                self._chain(x, "branch5x5_1", "branch5x5_2"),
                self._chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
                self.branch_pool(_average_pool(x)),
            ],
            axis=-1,
        )


class MixedB(_Block):
    """35 x 35 -> 17 x 17."""

    def __init__(self, features_in: int, *, rngs: nnx.Rngs):
        self._add("branch3x3", features_in, 384, (3, 3), 2, rngs=rngs)
        self._add("branch3x3dbl_1", features_in, 64, rngs=rngs)
        self._add("branch3x3dbl_2", 64, 96, (3, 3), rngs=rngs)
        self._add("branch3x3dbl_3", 96, 96, (3, 3), 2, rngs=rngs)

    def __call__(self, x):
        double = self._chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return jnp.concatenate([self.branch3x3(x), double, _max_pool(x, 2, "VALID")], axis=-1)


class MixedC(_Block):
    """17 x 17: 1x1, factored 7x7, double factored 7x7, average pool."""

    def __init__(self, features_in: int, width: int, *, rngs: nnx.Rngs):
        self._add("branch1x1", features_in, 192, rngs=rngs)
        self._add("branch7x7_1", features_in, width, rngs=rngs)
        self._add("branch7x7_2", width, width, (1, 7), rngs=rngs)
        self._add("branch7x7_3", width, 192, (7, 1), rngs=rngs)
        self._add("branch7x7dbl_1", features_in, width, rngs=rngs)
        self._add("branch7x7dbl_2", width, width, (7, 1), rngs=rngs)
        self._add("branch7x7dbl_3", width, width, (1, 7), rngs=rngs)
        self._add("branch7x7dbl_4", width, width, (7, 1), rngs=rngs)
        self._add("branch7x7dbl_5", width, 192, (1, 7), rngs=rngs)
        self._add("branch_pool", features_in, 192, rngs=rngs)

    def __call__(self, x):
        return jnp.concatenate(
            [
                self.branch1x1(x),
                self._chain(x, "branch7x7_1", "branch7x7_2", "branch7x7_3"),
                self._chain(x, *(f"branch7x7dbl_{i}" for i in range(1, 6))),
                self.branch_pool(_average_pool(x)),
            ],
            axis=-1,
        )


class MixedD(_Block):
    """17 x 17 -> 8 x 8."""

    def __init__(self, features_in: int, *, rngs: nnx.Rngs):
        self._add("branch3x3_1", features_in, 192, rngs=rngs)
        self._add("branch3x3_2", 192, 320, (3, 3), 2, rngs=rngs)
        self._add("branch7x7x3_1", features_in, 192, rngs=rngs)
        self._add("branch7x7x3_2", 192, 192, (1, 7), rngs=rngs)
        self._add("branch7x7x3_3", 192, 192, (7, 1), rngs=rngs)
        self._add("branch7x7x3_4", 192, 192, (3, 3), 2, rngs=rngs)

    def __call__(self, x):
        three = self._chain(x, "branch3x3_1", "branch3x3_2")
        seven = self._chain(x, *(f"branch7x7x3_{i}" for i in range(1, 5)))
        return jnp.concatenate([three, seven, _max_pool(x, 2, "VALID")], axis=-1)


class MixedE(_Block):
    """8 x 8: 1x1, split 3x3, split double 3x3, pool (by maximum in the last block)."""

    def __init__(self, features_in: int, max_pool: bool, *, rngs: nnx.Rngs):
        self.max_pool = max_pool
        self._add("branch1x1", features_in, 320, rngs=rngs)
        self._add("branch3x3_1", features_in, 384, rngs=rngs)
        self._add("branch3x3_2a", 384, 384, (1, 3), rngs=rngs)
        self._add("branch3x3_2b", 384, 384, (3, 1), rngs=rngs)
        self._add("branch3x3dbl_1", features_in, 448, rngs=rngs)
        self._add("branch3x3dbl_2", 448, 384, (3, 3), rngs=rngs)
        self._add("branch3x3dbl_3a", 384, 384, (1, 3), rngs=rngs)
        self._add("branch3x3dbl_3b", 384, 384, (3, 1), rngs=rngs)
        self._add("branch_pool", features_in, 192, rngs=rngs)

    def __call__(self, x):
        three = self.branch3x3_1(x)
        double = self._chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        pooled = _max_pool(x, 1, "SAME") if self.max_pool else _average_pool(x)
        return jnp.concatenate(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            axis=-1,
        )


class Inception(nnx.Module):
    """Pictures in [-1, 1], 299 x 299, to pooled features; attribute names are the checkpoint's."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = ConvReLU(3, 32, (3, 3), 2, rngs=rngs)
        self.Conv2d_2a_3x3 = ConvReLU(32, 32, (3, 3), rngs=rngs)
        self.Conv2d_2b_3x3 = ConvReLU(32, 64, (3, 3), padding=(1, 1), rngs=rngs)
        self.Conv2d_3b_1x1 = ConvReLU(64, 80, rngs=rngs)
        self.Conv2d_4a_3x3 = ConvReLU(80, 192, (3, 3), rngs=rngs)
        self.Mixed_5b = MixedA(192, 32, rngs=rngs)
        self.Mixed_5c = MixedA(256, 64, rngs=rngs)
        self.Mixed_5d = MixedA(288, 64, rngs=rngs)
        self.Mixed_6a = MixedB(288, rngs=rngs)
        self.Mixed_6b = MixedC(768, 128, rngs=rngs)
        self.Mixed_6c = MixedC(768, 160, rngs=rngs)
        self.Mixed_6d = MixedC(768, 160, rngs=rngs)
        self.Mixed_6e = MixedC(768, 192, rngs=rngs)
        self.Mixed_7a = MixedD(768, rngs=rngs)
        self.Mixed_7b = MixedE(1280, False, rngs=rngs)
        self.Mixed_7c = MixedE(2048, True, rngs=rngs)

    def __call__(self, x: Float[Array, "B 299 299 3"]) -> Float[Array, "B 2048"]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 147, 147, 64]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_max_pool(x, 2, "VALID")))  # [B, 71, 71, 192]
        x = _max_pool(x, 2, "VALID")  # [B, 35, 35, 192]
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)  # 6a: [B, 17, 17, 768], 7a: [B, 8, 8, 1280]
        return x.mean((1, 2))  # [B, 2048]


def resize(images: UInt8[Array, "B H W 3"]) -> Float[Array, "B 299 299 3"]:
    """uint8 pictures as the network's input (the module's docstring says which resize)."""
    x = to_unit(images)
    return jax.image.resize(x, (x.shape[0], SIZE, SIZE, x.shape[3]), "linear", antialias=False)


def inception_state_from_torch(tensors: Mapping[str, np.ndarray], network: Inception) -> nnx.State:
    """The parameters of `network` (may be abstract) from the checkpoint's tensors, batch
    normalisation folded in.

    Raises ValueError, in one line, naming tensors that are missing or of another shape.
    """
    flat, problems = {}, []
    params = dict(nnx.to_flat_state(nnx.state(network, nnx.Param)))
    for path in {path[:-1] for path in params}:
        name = ".".join(path)
        height, width, features_in, features = params[(*path, "kernel")].shape
        shapes = {f"{name}.conv.weight": (features, features_in, height, width)}
        shapes |= {
            f"{name}.bn.{leaf}": (features,)
            for leaf in ("weight", "bias", "running_mean", "running_var")
        }
        found = {key: tensors[key].shape if key in tensors else "missing" for key in shapes}
        problems += [
            f"{key}: {found[key]}, wanted {shapes[key]}"
            for key in shapes
            if found[key] != shapes[key]
        ]
        if problems:
            continue
        kernel, scale, bias, mean, variance = (
            np.asarray(tensors[key], np.float64) for key in shapes
        )
        scale = scale / np.sqrt(variance + _BN_EPS)
        kernel = kernel.transpose(2, 3, 1, 0) * scale  # OIHW -> HWIO
        for leaf, value in (("kernel", kernel), ("bias", bias - mean * scale)):
            flat[(*path, leaf)] = params[(*path, leaf)].replace(jnp.asarray(value, jnp.float32))
    if problems:
        raise ValueError(
            f"Inception weights: {len(problems)} tensors do not fit: "
            f"{'; '.join(sorted(problems)[:3])}"
        )
    known = {".".join(path) for path in {path[:-1] for path in params}}
    unknown = [
        k for k in tensors if not k.startswith(_UNUSED) and ".".join(k.split(".")[:-2]) not in known
    ]
    if unknown:
        raise ValueError(
            "Inception weights: unknown tensors, so another network's: "
            f"{', '.join(sorted(unknown)[:3])}"
        )
    return nnx.from_flat_state(flat)


def load_inception(path: str | pathlib.Path) -> Inception:
    """The network from the checkpoint written as safetensors.

    Raises ValueError for a file that is absent, a pickle, damaged, or another network's.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected pt_inception-2015-12-05 as safetensors")
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02"):
        raise ValueError(
            f"{path}: a torch pickle, which can run code when read; write it as safetensors: "
            f"{TO_SAFETENSORS}"
        )
    try:
        tensors = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None
    network = nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0)))
    nnx.update(network, inception_state_from_torch(tensors, network))
    return network
