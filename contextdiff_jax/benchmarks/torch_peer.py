"""torch's side of the comparison: diffusers' network with our weights, AdamW, and the loop of its
pipelines.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import diffusers
import jax
import numpy as np
import torch

from contextdiff_jax.benchmarks.network import to_torch
from contextdiff_jax.diffusion.schedule import SPACINGS
from contextdiff_jax.models.backbones import Backbone, BackboneConfig, kind_of
from contextdiff_jax.pretrained.unet import known_to_diffusers
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.host import num_cores
from contextdiff_jax.settings import Settings, TrainConfig

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
_PREDICTION_TYPES = {"x0": "sample", "epsilon": "epsilon", "v": "v_prediction"}
Tensors = Mapping[str, torch.Tensor]


def _call_unet(
    unet: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, inputs: Tensors
) -> torch.Tensor:
    added = None
    if "pooled" in inputs:  # of the XL kind, which reads the picture's size as well
        size = torch.tensor([[*x.shape[2:], 0.0, 0.0, *x.shape[2:]]]).expand(len(x), -1)
        added = {"text_embeds": inputs["pooled"], "time_ids": size}
    return unet(x, t, inputs["text"], added_cond_kwargs=added).sample


def _call_transformer(
    transformer: torch.nn.Module, x: torch.Tensor, t: torch.Tensor, inputs: Tensors
) -> torch.Tensor:
    return transformer(x, inputs["text"], inputs["pooled"], t.to(x.device).expand(len(x))).sample


class Kind(NamedTuple):
    """What is particular of diffusers' network of a kind of backbone: its class, its call and the
    memory layouts of pictures that one might choose for it.
    """

    network: type[torch.nn.Module]
    call: Callable[..., torch.Tensor]
    layouts: tuple[str, ...]


KINDS = {
    "unet": Kind(diffusers.UNet2DConditionModel, _call_unet, tuple(LAYOUTS)),
    # a matrix product of its patches is all that it does with a picture
    "mmdit": Kind(diffusers.SD3Transformer2DModel, _call_transformer, ("NCHW",)),
}


def layouts(config: BackboneConfig) -> tuple[str, ...]:
    """The names in `LAYOUTS` that are to be tried."""
    return KINDS[kind_of(known_to_diffusers(config))].layouts


def make_network(config: BackboneConfig) -> torch.nn.Module:
    """diffusers' network of this config, which has no context head. ValueError for one that it
    doesn't have.
    """
    values = known_to_diffusers(config).to_dict()
    values.pop("context_head", None)
    return KINDS[kind_of(config)].network(**values)


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], train: TrainConfig
) -> torch.optim.AdamW:
    """AdamW by the numbers of a config."""
    return torch.optim.AdamW(
        parameters,
        lr=train.learning_rate,
        betas=(train.b1, train.b2),
        eps=1e-8,
        weight_decay=train.weight_decay,
        fused=torch_device() == "cuda",
    )


def torch_device() -> str:
    """Where torch runs beside ours: `cuda` where JAX has a GPU.

    Raises ValueError where JAX has one and torch can't use it: times of two machines say nothing.
    """
    if jax.default_backend() != "gpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError(
            "--compare='torch': JAX has a GPU and this torch has none; install torch for CUDA"
        )
    return "cuda"


def peers(network: Backbone, settings: Settings) -> dict[str, TorchNetwork]:
    """What a team might run, by name. On a GPU the layout is channels_last where pictures have one,
    eager and through torch.compile, which has the same weights and moments (billions of them fit
    once); on a CPU, where torch.compile needs a C++ compiler that a machine may lack, each layout,
    eager.
    """
    config = network.config
    if torch_device() == "cpu":
        return {f"torch {one}": TorchNetwork(network, settings, one) for one in layouts(config)}
    layout = layouts(config)[0]
    eager = TorchNetwork(network, settings, layout)
    return {f"torch {layout}": eager, f"torch {layout} compiled": eager.compiled()}


class TorchNetwork:
    """diffusers' network in one of `LAYOUTS` on `torch_device()`, in the precision of
    `train.precision` by autocast; on a CPU with as many threads as this process has cores.
    `eager`: of a compiled one, what was compiled.
    """

    eager: TorchNetwork | None = None

    def __init__(self, network: Backbone, settings: Settings, layout: str):
        torch.set_num_threads(num_cores())
        self._device, self._format = torch_device(), LAYOUTS[layout]
        self._dtype = PRECISIONS[settings.train.precision]
        self._call = KINDS[kind_of(network.config)].call
        with torch.device(self._device):  # which draws what is replaced
            self._network = make_network(network.config)
        self._network.load_state_dict(
            {name: torch.tensor(array) for name, array in to_torch(network).items()}
        )
        self._network.to(self._device, memory_format=self._format)
        self._run = self._network
        self._optimizer = make_optimizer(self._network.parameters(), settings.train)

    def compiled(self) -> TorchNetwork:
        """This network, its optimizer too, through torch.compile."""
        other = copy.copy(self)
        other.eager, other._run = self, torch.compile(self._network)
        return other

    def tensors(self, inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """NHWC arrays as NCHW tensors in this layout, the others as they are."""
        on = functools.partial(torch.tensor, device=self._device)
        return {
            name: on(a).permute(0, 3, 1, 2).contiguous(memory_format=self._format)
            if a.ndim == 4
            else on(a)
            for name, a in inputs.items()
        }

    def _predict(self, x: torch.Tensor, t: torch.Tensor, inputs: Tensors) -> torch.Tensor:
        cast = self._dtype != torch.float32
        with torch.autocast(self._device, dtype=self._dtype, enabled=cast):
            return self._call(self._run, x, t, inputs).float()

    @torch.no_grad()
    def forward(self, inputs: Tensors) -> np.ndarray:
        """The prediction, NHWC."""
        return self._predict(inputs["x"], inputs["t"], inputs).permute(0, 2, 3, 1).cpu().numpy()

    def _loss(self, inputs: Tensors) -> torch.Tensor:
        output = self._predict(inputs["x"], inputs["t"], inputs)
        return torch.nn.functional.mse_loss(output, inputs["target"])

    @torch.no_grad()
    def loss(self, inputs: Tensors) -> float:
        """The mean squared error."""
        return self._loss(inputs).item()

    def step(self, inputs: Tensors) -> float:
        """One step of AdamW on the mean squared error; the loss before it."""
        self._optimizer.zero_grad()
        loss = self._loss(inputs)
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def has_room_for(self, needed: int) -> bool:
        """Whether the device has as many bytes beside what torch holds of it; a CPU's memory is
        never asked.
        """
        return self._device == "cpu" or torch.cuda.mem_get_info()[0] > 1.1 * needed

    def release(self) -> None:
        """Give all memory back; there are no calls after it."""
        self._network = self._run = self._optimizer = None
        torch.compiler.reset()
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """The most that a call has allocated on the GPU; None on a CPU."""
        if self._device == "cpu":
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()

    def parameters(self) -> dict[str, np.ndarray]:
        """Copy the parameters, by diffusers' names."""
        parameters = self._network.named_parameters()
        return {name: p.detach().cpu().numpy().copy() for name, p in parameters}

    def sampler(
        self, inputs: Mapping[str, np.ndarray], settings: Settings
    ) -> Callable[[], np.ndarray]:
        """`sample` of these inputs by the config."""
        scheduler, guidance = make_scheduler(settings), settings.sample.guidance
        return functools.partial(self.sample, self.tensors(inputs), scheduler, guidance)

    @torch.no_grad()
    def sample(self, inputs: Tensors, scheduler: Scheduler, guidance: float) -> np.ndarray:
        """Run the loop of diffusers' pipelines, both branches in one batch, the weights in the
        precision of the products. NHWC.
        """
        if next(self._network.parameters()).dtype != self._dtype:
            self._network.to(self._dtype)
        x, scheduler = inputs["x"], copy.copy(scheduler)  # it counts its steps
        for t in scheduler.timesteps:
            without, with_text = self._predict(torch.cat([x, x]), t, inputs).chunk(2)
            x = scheduler.step(without + guidance * (with_text - without), t, x).prev_sample
        return x.permute(0, 2, 3, 1).cpu().numpy()


Scheduler = diffusers.DDIMScheduler | diffusers.FlowMatchEulerDiscreteScheduler


def make_scheduler(settings: Settings) -> Scheduler:
    """diffusers' scheduler of our process and its steps, at their first.

    Raises ValueError for a process that diffusers has none of.
    """
    return (_euler if settings.diffusion.make_schedule().continuous else _ddim)(settings)


def _euler(settings: Settings) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """Euler's method on the straight path, which DDIM without noise is there, at our times."""
    config, sample = settings.diffusion, settings.sample
    for field in ("schedule", "prediction_type"):
        only = {"schedule": "flow", "prediction_type": "velocity"}[field]
        check_choice(f"diffusion.{field}", getattr(config, field), (only,), "--compare='torch'")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sample.times(config.make_schedule()))
    return scheduler


def _ddim(settings: Settings) -> diffusers.DDIMScheduler:
    """Raises ValueError for a number of steps that doesn't divide the timesteps: its steps then
    don't end where the next begin.
    """
    config, sample = settings.diffusion, settings.sample
    if config.num_timesteps % sample.steps:
        raise ValueError(
            f"sample.steps={sample.steps}: must divide "
            f"diffusion.num_timesteps={config.num_timesteps} with --compare='torch'"
        )
    check_choice("sample.spacing", sample.spacing, SPACINGS, "--compare='torch'")
    kinds = tuple(_PREDICTION_TYPES)
    check_choice("diffusion.prediction_type", config.prediction_type, kinds, "--compare='torch'")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=config.num_timesteps,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type=_PREDICTION_TYPES[config.prediction_type],
        timestep_spacing=sample.spacing,
    )
    scheduler.alphas_cumprod = torch.tensor(np.asarray(config.make_schedule().alphas_cumprod))
    scheduler.set_timesteps(sample.steps)
    return scheduler
