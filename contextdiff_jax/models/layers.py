"""Blocks shared by the image and video networks: NHWC, Flax NNX, parameters only.

The functions are those of diffusers' torch modules, and the attribute names follow theirs, so that
the name map of `contextdiff_jax.pretrained` stays mechanical. Precision: parameters are stored in
`param_dtype`, products run in `dtype`; the statistics of the normalisations and the softmax are
float32 whatever `dtype` is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Shaped

from contextdiff_jax.models.remat import from_arguments, rematerialised
from contextdiff_jax.parallel.mesh import current_target

_ZEROS = nnx.initializers.zeros_init()
LECUN = nnx.initializers.lecun_normal()


def mish(x: Float[ArrayLike, "*S"]) -> Float[Array, "*S"]:
    """x tanh(softplus(x)) (Misra, 2019)."""
    return x * jnp.tanh(jax.nn.softplus(x))


def gelu(x: Float[ArrayLike, "*S"]) -> Float[Array, "*S"]:
    """The exact (erf) GELU: the pretrained networks were not trained with the tanh approximation.

    As torch writes it. `jax.nn.gelu` takes erfc, whose two branches cost three times as much on a
    CPU.
    """
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


def quick_gelu(x: Float[ArrayLike, "*S"]) -> Float[Array, "*S"]:
    """x sigmoid(1.702 x): the GELU of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


@from_arguments
def gelu_tanh(x: Float[ArrayLike, "*S"]) -> Float[Array, "*S"]:
    """The tanh approximation of GELU, as T5 1.1 was trained with."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": gelu,
    "relu": jax.nn.relu,
    "mish": mish,
}
# transformers' names; diffusers' networks know only those above.
TEXT_ACTIVATIONS = ACTIVATIONS | {
    "quick_gelu": quick_gelu,
    "gelu_python": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
}


def torch_frequencies(half: int) -> Float[np.ndarray, " D2"]:
    """The frequencies of `timestep_embedding`, rounded as in diffusers: times go up to 1000, and
    the last bit of a frequency moves an angle by 3e-5.
    """
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32)
    exponents = exponents / np.float32(half)
    return np.exp(exponents.astype(np.float64)).astype(np.float32)


def timestep_embedding(
    t: Shaped[ArrayLike, "*N"],
    dim: int,
    *,
    flip_sin_to_cos: bool = True,
    freq_shift: float = 0.0,
    frequencies: Float[np.ndarray, " D2"] | None = None,
) -> Float[Array, "*N D"]:
    """Sinusoidal embedding of a (possibly fractional) timestep (Ho et al., 2020), in float32.

    Args:
      t: timesteps, any shape, integer or float.
      dim: width D >= 4; an odd width is padded with one zero.
      flip_sin_to_cos: [cos, sin] if true (Stable Diffusion), else [sin, cos].
      freq_shift: the lowest frequency is 1e-4^((half - 1) / (half - freq_shift)), half = dim // 2.
      frequencies: all of them, instead.
    """
    half = dim // 2
    if frequencies is None:
        exponents = jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
        frequencies = jnp.exp(-math.log(10000.0) * exponents)
    angles = jnp.asarray(t, jnp.float32)[..., None] * frequencies  # [*N, D // 2]
    parts = (
        [jnp.cos(angles), jnp.sin(angles)]
        if flip_sin_to_cos
        else [jnp.sin(angles), jnp.cos(angles)]
    )
    if dim % 2:
        parts.append(jnp.zeros_like(angles[..., :1]))
    return jnp.concatenate(parts, axis=-1)


def upsample_nearest(
    x: Float[ArrayLike, "B H W C"], size: tuple[int, int] | None = None
) -> Float[Array, "B H2 W2 C"]:
    """Twice the height and width by repetition, cropped to `size` (sides of 2n or 2n - 1: a
    stride-2 skip's).

    The crop equals torch's nearest interpolation to that size: floor(i n / (2n - 1)) = i // 2.
    """
    B, H, W, C = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)
    return x if size is None else x[:, : size[0], : size[1]]


@jax.custom_vjp
def matmul(x: Float[ArrayLike, "*N K"], kernel: Float[ArrayLike, "K M"]) -> Float[Array, "*N M"]:
    """x kernel, with its gradient by the kernel in the form that XLA's CPU backend is fast at.

    JAX's own rule computes (g^T x)^T, which it turns into a loop over a transposed g (one core, 4 x
    256 tokens, 128 to 1024 features: 38 GFLOP/s). Here x^T g (90), or, to transpose the narrower of
    the two, (g^T x)^T behind a barrier.
    """
    return x @ kernel


def _matmul_fwd(x: ArrayLike, kernel: ArrayLike) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _matmul_bwd(saved: tuple[Array, Array], g: ArrayLike) -> tuple[Array, Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    narrows = x.shape[-1] > g.shape[-1] and current_target().platform != "gpu"
    product = lax.dot_general(*((g, x) if narrows else (x, g)), ((rows, rows), ((), ())))
    return g @ kernel.T, lax.optimization_barrier(product).T if narrows else product


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _dot_general(x: ArrayLike, kernel: ArrayLike, *_, **__) -> Array:
    """`matmul` as nnx.Linear calls it: one function for all layers, or two modules alike would have
    unequal graphs, compiled twice.
    """
    return matmul(x, kernel)


def linear(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    zero_init: bool = False,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A dense layer; `zero_init` is for the last one of a residual branch, so that it starts as
    nothing.
    """
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        kernel_init=_ZEROS if zero_init else LECUN,
        dot_general=_dot_general,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def convolve(
    x: Float[ArrayLike, "B H W C"],
    kernel: Float[ArrayLike, "K L C D"],
    strides: tuple[int, int],
    padding: Sequence[tuple[int, int]],
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    **options,
) -> Float[Array, "B H2 W2 D"]:
    """`lax.conv_general_dilated`, which nnx.Conv calls; where devices share the rows of a picture,
    the sum of what each row of the kernel gives.

    XLA's partitioner (jaxlib 0.10.2, also without Shardy) adds up a convolution over split rows
    once too often for each device that holds the same rows. Slices it gets right, and sends the
    same borders.
    """
    run = functools.partial(
        lax.conv_general_dilated, dimension_numbers=dimension_numbers, **options
    )
    if not current_target().splits("rows"):
        return run(x, kernel, strides, padding)
    rows = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0)))
    last = rows.shape[1] - kernel.shape[0]  # where the kernel comes to lie at last
    return sum(
        run(
            lax.slice_in_dim(rows, i, i + last + 1, strides[0], axis=1),
            kernel[i : i + 1],
            (1, strides[1]),
            ((0, 0), padding[1]),
        )
        for i in range(kernel.shape[0])
    )


def conv3x3(
    in_channels: int,
    out_channels: int,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (1, 1),
    zero_init: bool = False,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A 3x3 convolution padded by 1 on each side (as torch; XLA's SAME differs from it at stride
    2).
    """
    return nnx.Conv(
        in_channels,
        out_channels,
        (3, 3),
        strides=(stride, stride),
        padding=(padding, padding),
        kernel_init=_ZEROS if zero_init else LECUN,
        conv_general_dilated=convolve,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He, 2018) as x * a + b, with a and b [B, C] from per-channel sums
    in float32.

    The sums over H, W come first and the groups are formed from [B, C]: x is never reshaped, is
    read once for the statistics and once for the multiply-add, and the backward pass inherits the
    same form.
    """

    def __init__(
        self,
        channels: int,
        num_groups: int,
        *,
        eps: float = 1e-5,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,  # with the rest of a policy: nothing is drawn
    ):
        self.num_groups = num_groups
        self.eps = eps
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x: Float[ArrayLike, "*S C"], axis: int = 0) -> Float[Array, "*S C"]:
        """x normalised, each of the B samples along `axis` by itself."""
        B, C = x.shape[axis], x.shape[-1]
        G = self.num_groups
        x = x.astype(jnp.float32)
        axes = tuple(i for i in range(x.ndim - 1) if i != axis)
        count = math.prod(x.shape[i] for i in axes) * (C // G)
        mean = x.sum(axes).reshape(B, G, C // G).sum(-1) / count  # [B, G]
        square = jnp.square(x).sum(axes).reshape(B, G, C // G).sum(-1) / count
        rstd = lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + self.eps)
        a = jnp.repeat(rstd, C // G, axis=1) * self.scale[...].astype(jnp.float32)  # [B, C]
        b = self.bias[...].astype(jnp.float32) - jnp.repeat(mean, C // G, axis=1) * a
        a, b = (jnp.expand_dims(y, axes) for y in (a, b))
        return (x * a + b).astype(self.dtype)


class TimestepEmbedding(nnx.Module):
    """Linear, activation, linear: the MLP on top of a sinusoidal (or pooled text) embedding."""

    def __init__(self, in_features: int, out_features: int, *, act_fn: str = "silu", **policy):
        self.act = ACTIVATIONS[act_fn]
        self.linear_1 = linear(in_features, out_features, **policy)
        self.linear_2 = linear(out_features, out_features, **policy)

    def __call__(self, x: Float[ArrayLike, "B D"]) -> Float[Array, "B E"]:
        return self.linear_2(self.act(self.linear_1(x)))


class ResnetBlock(nnx.Module):
    """GroupNorm, activation, conv; time; GroupNorm, activation, conv; plus the (projected) input.

    `time_scale_shift`: "default" adds the projected time embedding before the second norm,
    "scale_shift" modulates its output (ADM). The last conv starts at zero, so that a new block is
    its shortcut. Without `time_features` (autoencoders) there is no time. `scale`: of the sum at
    the end. `remat`: what is kept for the backward pass (models.remat).
    """

    remat = "none"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_features: int | None,
        *,
        num_groups: int,
        eps: float,
        act_fn: str = "silu",
        time_scale_shift: str = "default",
        scale: float = 1.0,
        **policy: Any,
    ):
        norm = dict(eps=eps, **policy)
        self.scale = scale
        self.act = ACTIVATIONS[act_fn]
        self.time_scale_shift = time_scale_shift
        self.norm1 = GroupNorm(in_channels, num_groups, **norm)
        self.conv1 = conv3x3(in_channels, out_channels, **policy)
        time_out = 2 * out_channels if time_scale_shift == "scale_shift" else out_channels
        self.time_emb_proj = (
            None if time_features is None else linear(time_features, time_out, **policy)
        )
        self.norm2 = GroupNorm(out_channels, num_groups, **norm)
        self.conv2 = conv3x3(out_channels, out_channels, zero_init=True, **policy)
        # A 1x1 convolution is a matrix product, which XLA differentiates into matrix products too.
        same = in_channels == out_channels
        self.conv_shortcut = None if same else linear(in_channels, out_channels, **policy)

    @rematerialised
    def __call__(
        self, x: Float[ArrayLike, "B H W C"], temb: Float[ArrayLike, "B E"] | None = None
    ) -> Float[Array, "B H W D"]:
        h = self._second_norm(self.conv1(self.act(self.norm1(x))), temb)
        h = self.conv2(self.act(h))
        h = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.scale == 1 else self.scale * h

    def _second_norm(
        self, h: Float[ArrayLike, "B H W D"], temb: Float[ArrayLike, "B E"] | None
    ) -> Float[Array, "B H W D"]:
        if self.time_emb_proj is None:
            return self.norm2(h)
        time = self.time_emb_proj(self.act(temb))[:, None, None, :]
        if self.time_scale_shift == "scale_shift":
            scale, shift = jnp.split(time, 2, axis=-1)
            return self.norm2(h) * (1 + scale) + shift
        return self.norm2(h + time)


class Downsample(nnx.Module):
    """A 3x3 convolution of stride 2: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), C].

    `pad_end` (autoencoders) pads only below and on the right: [B, floor(H/2), floor(W/2), C].
    `out_channels`: D, if it isn't C.
    """

    def __init__(
        self, channels: int, out_channels: int | None = None, *, pad_end: bool = False, **policy
    ):
        padding = (0, 1) if pad_end else (1, 1)
        self.conv = conv3x3(channels, out_channels or channels, stride=2, padding=padding, **policy)

    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H2 W2 D"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest upsampling by 2, cropped to the skip's size, and a 3x3 convolution, to
    `out_channels` if they are others.
    """

    def __init__(self, channels: int, out_channels: int | None = None, **policy):
        self.conv = conv3x3(channels, out_channels or channels, **policy)

    def __call__(
        self, x: Float[ArrayLike, "B H W C"], size: tuple[int, int] | None = None
    ) -> Float[Array, "B H2 W2 D"]:
        return self.conv(upsample_nearest(x, size))
