"""The whole method's training step in torch: what a team would write there, with our weights and on
our batch.

Text encoder, relational network (`cross_attention`, plugin estimate), shift, diffusers' UNet, AdamW
on clipped gradients, average of the weights. Parameters have our paths, joined by dots, but for the
UNet's, which have diffusers' names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.nn import functional as F

from contextdiff_jax.benchmarks.torch_peer import (
    LAYOUTS,
    make_network,
    make_optimizer,
    torch_device,
)
from contextdiff_jax.diffusion import shift_coefficient
from contextdiff_jax.models.backbones import kind_of
from contextdiff_jax.models.context import ContextConfig, position_embedding
from contextdiff_jax.models.contextdiff import ContextDiffusion
from contextdiff_jax.models.text import TextConfig
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.pretrained.unet import unet_state_to_torch
from contextdiff_jax.runtime.host import num_cores
from contextdiff_jax.settings import Settings


class _Attention(torch.nn.Module):
    def __init__(self, width: int, heads: int, source: int):
        super().__init__()
        self.heads = heads
        self.to_q = torch.nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (torch.nn.Linear(source, width, bias=False) for _ in range(2))
        self.to_out = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
            .transpose(1, 2)
            .flatten(2)
        )


class _FeedForward(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj_in, self.proj_out = (
            torch.nn.Linear(width, 8 * width),
            torch.nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj_in(x).chunk(2, -1)
        return self.proj_out(value * F.gelu(gate))


class _Block(torch.nn.Module):
    """Block of both transformers: attention to `context` (None: to itself), a feed-forward."""

    def __init__(self, width: int, heads: int, source: int):
        super().__init__()
        self.norm1, self.norm2 = (torch.nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention, self.ff = _Attention(width, heads, source), _FeedForward(width)

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor
    ) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h if context is None else context, mask)
        return x + self.ff(self.norm2(x))


class _Text(torch.nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.tokens = torch.nn.Embedding(config.vocab_size, config.width)
        self.positions = torch.nn.Parameter(torch.zeros(config.max_length, config.width))
        self.blocks = torch.nn.ModuleList(
            _Block(config.width, config.num_heads, config.width) for _ in range(config.num_layers)
        )
        self.norm = torch.nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, None, mask)
        return self.norm(x)


class _Raw(torch.nn.Module):
    def __init__(self, config: ContextConfig):
        super().__init__()
        self.embed = torch.nn.Linear(config.token_width, config.width)
        blocks = (
            _Block(config.width, config.num_heads, config.text_width)
            for _ in range(config.num_blocks)
        )
        self.blocks = torch.nn.ModuleList(blocks)
        self.norm = torch.nn.LayerNorm(config.width, eps=1e-6)


class _Context(torch.nn.Module):
    """r_phi of x0, NCHW."""

    def __init__(self, config: ContextConfig, height: int, width: int):
        super().__init__()
        self.config, p = config, config.patch_size
        self.grid = height // p, width // p
        self.gamma = torch.nn.Parameter(torch.zeros(()))
        self.raw, self.unembed = _Raw(config), torch.nn.Linear(config.width, config.token_width)
        self.register_buffer(
            "position",
            torch.tensor(np.asarray(position_embedding(*self.grid, config.width))),
            persistent=False,
        )

    def forward(self, x0: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        (h, w), p = self.grid, self.config.patch_size
        patches = (
            x0.unflatten(2, (h, p))
            .unflatten(4, (w, p))
            .permute(0, 2, 4, 3, 5, 1)
            .flatten(3)
            .flatten(1, 2)
        )
        x = self.raw.embed(patches) + self.position
        for block in self.raw.blocks:
            x = block(x, text, mask)
        raw = (
            self.unembed(self.raw.norm(x))
            .unflatten(1, (h, w))
            .unflatten(3, (p, p, -1))
            .permute(0, 5, 1, 3, 2, 4)
        )
        raw = raw.flatten(4).flatten(2, 3)
        gain = self.config.max_gain * torch.tanh(self.gamma)
        return gain * raw / torch.sqrt(raw.square().mean((1, 2, 3), keepdim=True) + 1e-8)


def _named(state: nnx.State) -> dict[str, np.ndarray]:
    """Our parameters of text encoder and context by torch's names, in torch's layout."""
    last = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    found = {}
    for path, leaf in nnx.to_flat_state(state):
        array = np.asarray(leaf.get_value())
        name = ".".join(map(str, (*path[:-1], last.get(path[-1], path[-1]))))
        found[name] = array.T if path[-1] == "kernel" else array
    return found


def method_parameters(model: ContextDiffusion) -> dict[str, np.ndarray]:
    """All parameters of our model by the names of `TorchMethod.parameters`."""
    unet = {f"unet.{name}": array for name, array in unet_state_to_torch(model.unet).items()}
    parts = (
        (part, _named(nnx.state(getattr(model, part), nnx.Param))) for part in ("text", "context")
    )
    return unet | {
        f"{part}.{name}": array for part, named in parts for name, array in named.items()
    }


def lacking(settings: Settings) -> str | None:
    """Return the first field that has no torch version, with its value; None if all have."""
    if not isinstance(settings.model, UNetConfig):
        return f"model.kind={kind_of(settings.model)!r}"
    context, diffusion = settings.context, settings.diffusion
    only = {
        "context.kind": (context.kind, "cross_attention"),
        "context.tokens": (context.tokens, "patches"),
        "context.estimate": (context.estimate, "plugin"),
        "context.caption": (context.caption, "true"),
        "context.time_dependent": (context.time_dependent, False),
        "diffusion.weighting": (diffusion.weighting, "uniform"),
        "diffusion.prior_kl": (diffusion.prior_kl, 0.0),
        "model.addition_embed_type": (settings.model.addition_embed_type, None),
        "train.accumulation": (settings.train.accumulation, 1),
        "train.optimizer": (settings.train.optimizer, "adamw"),
        "train.precision": (settings.train.precision, "float32"),
        "device": (torch_device(), "cpu"),
    }
    return next(
        (f"{field}={value!r}" for field, (value, known) in only.items() if value != known), None
    )


class TorchMethod:
    """Eager, in one of `LAYOUTS`, with as many threads as this process has cores."""

    def __init__(self, model: ContextDiffusion, settings: Settings, layout: str):
        context, train, diffusion = settings.context, settings.train, settings.diffusion
        torch.set_num_threads(num_cores())
        self._format, self._train, self._type = LAYOUTS[layout], train, diffusion.prediction_type
        self._parts = torch.nn.ModuleDict(
            {
                "unet": make_network(model.unet.config),
                "text": _Text(settings.text),
                "context": _Context(model.context.config, *settings.shape[:2]),
            }
        )
        self._parts.load_state_dict(
            {name: torch.tensor(array) for name, array in method_parameters(model).items()}
        )
        self._parts["unet"].to(memory_format=self._format)
        self._average, self._steps = copy.deepcopy(self._parts), 0
        self._optimizer = make_optimizer(self._parts.parameters(), train)
        schedule, t = diffusion.make_schedule(), jnp.arange(diffusion.num_timesteps)
        k = shift_coefficient(schedule, t, context.shift)
        coefficients = jnp.sqrt(schedule.alpha_bar(t)), jnp.sqrt(schedule.variance(t)), k
        self._a, self._b, self._k = (
            torch.tensor(np.asarray(c))[:, None, None, None] for c in coefficients
        )

    def parameters(self) -> dict[str, np.ndarray]:
        """Copy the parameters, by name."""
        return {name: p.detach().numpy().copy() for name, p in self._parts.named_parameters()}

    def step(
        self,
        batch: Mapping[str, np.ndarray],
        null: Mapping[str, np.ndarray],
        drawn: Mapping[str, np.ndarray] | None,
    ) -> float:
        """Do one training step; return the loss before it.

        `drawn`: t, noise, dropped, or None to draw them.
        """
        x0 = (
            torch.tensor(batch["image"])
            .permute(0, 3, 1, 2)
            .to(torch.float32, memory_format=self._format)
            / 127.5
            - 1
        )
        if drawn is None:
            t = torch.randint(len(self._a), (len(x0),))
            noise, dropped = torch.randn_like(x0), torch.rand(len(x0)) < self._train.caption_dropout
        else:
            t, dropped = (torch.tensor(drawn[name]) for name in ("t", "dropped"))
            noise = (
                torch.tensor(drawn["noise"])
                .permute(0, 3, 1, 2)
                .contiguous(memory_format=self._format)
            )
        names = "token_ids", "token_mask"
        (ids, mask), (null_ids, null_mask) = (
            [torch.tensor(each[name]) for name in names] for each in (batch, null)
        )
        self._optimizer.zero_grad()
        tokens = self._parts["text"](ids, mask)
        r = self._parts["context"](x0, tokens, mask)
        a, b, k = (c[t] for c in (self._a, self._b, self._k))
        x_t = a * x0 + k * r + b * noise
        epsilon = (x_t - a * x0) / b
        target = {"x0": x0, "epsilon": epsilon, "v": a * epsilon - b * x0}[self._type]
        tokens = torch.where(
            dropped[:, None, None], self._parts["text"](null_ids, null_mask), tokens
        )
        seen = torch.where(dropped[:, None], null_mask, mask)
        output = self._parts["unet"](x_t, t, tokens, encoder_attention_mask=seen).sample
        loss = F.mse_loss(output, target)
        loss.backward()
        if self._train.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._parts.parameters(), self._train.clip_norm)
        self._optimizer.step()
        decay = min(self._train.ema_decay, (1 + self._steps) / (10 + self._steps))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self._average.parameters()), list(self._parts.parameters()), 1 - decay
            )
        self._steps += 1
        return loss.item()
