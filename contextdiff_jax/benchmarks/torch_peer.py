"""torch's side of the comparison: diffusers' UNet with our weights, AdamW, and its DDIM loop. The
one importer of torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import diffusers
import numpy as np
import torch

from contextdiff_jax.diffusion.schedule import SPACINGS
from contextdiff_jax.models.unet import UNet
from contextdiff_jax.models.unet_config import UNetConfig
from contextdiff_jax.pretrained.unet import known_to_diffusers, unet_state_to_torch
from contextdiff_jax.runtime.fields import check_choice
from contextdiff_jax.runtime.host import num_cores
from contextdiff_jax.settings import Settings, TrainConfig

LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
_PREDICTION_TYPES = {"x0": "sample", "epsilon": "epsilon", "v": "v_prediction"}


def make_unet(config: UNetConfig) -> diffusers.UNet2DConditionModel:
    """diffusers' network of this config, which has no context head. ValueError for one that it
    doesn't have.
    """
    values = known_to_diffusers(config).to_dict()
    values.pop("context_head", None)
    return diffusers.UNet2DConditionModel(**values)


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
    )


class TorchUNet:
    """diffusers' network in one of `LAYOUTS`, eager, with as many threads as this process has
    cores.
    """

    def __init__(self, unet: UNet, settings: Settings, layout: str):
        torch.set_num_threads(num_cores())
        self._format = LAYOUTS[layout]
        self._unet = make_unet(unet.config)
        self._unet.load_state_dict(
            {name: torch.tensor(array) for name, array in unet_state_to_torch(unet).items()}
        )
        self._unet.to(memory_format=self._format)
        self._optimizer = make_optimizer(self._unet.parameters(), settings.train)

    def tensors(self, inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """NHWC arrays as NCHW tensors in this layout, the others as they are."""
        return {
            name: torch.tensor(a).permute(0, 3, 1, 2).contiguous(memory_format=self._format)
            if a.ndim == 4
            else torch.tensor(a)
            for name, a in inputs.items()
        }

    def _predict(
        self, x: torch.Tensor, t: torch.Tensor, inputs: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
        return self._unet(x, t, inputs["text"], added_cond_kwargs=added or None).sample

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        """The prediction, NHWC."""
        return self._predict(inputs["x"], inputs["t"], inputs).permute(0, 2, 3, 1).numpy()

    def step(self, inputs: Mapping[str, torch.Tensor]) -> float:
        """One step of AdamW on the mean squared error; the loss before it."""
        self._optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(
            self._predict(inputs["x"], inputs["t"], inputs), inputs["target"]
        )
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def parameters(self) -> dict[str, np.ndarray]:
        """Copy the parameters, by diffusers' names."""
        return {name: p.detach().numpy().copy() for name, p in self._unet.named_parameters()}

    @torch.no_grad()
    def sample(
        self,
        inputs: Mapping[str, torch.Tensor],
        scheduler: diffusers.DDIMScheduler,
        guidance: float,
    ) -> np.ndarray:
        """Run the DDIM loop of diffusers' pipelines, both branches in one batch. NHWC."""
        x = inputs["x"]
        for t in scheduler.timesteps:
            without, with_text = self._predict(torch.cat([x, x]), t, inputs).chunk(2)
            x = scheduler.step(without + guidance * (with_text - without), t, x).prev_sample
        return x.permute(0, 2, 3, 1).numpy()


def make_scheduler(settings: Settings) -> diffusers.DDIMScheduler:
    """diffusers' DDIM with our schedule and its steps.

    Raises ValueError for a number of steps that doesn't divide the timesteps: its steps then don't
    end where the next begin.
    """
    config, sample = settings.diffusion, settings.sample
    if config.num_timesteps % sample.steps:
        raise ValueError(
            f"sample.steps={sample.steps}: must divide "
            f"diffusion.num_timesteps={config.num_timesteps} with --compare='torch'"
        )
    check_choice("sample.spacing", sample.spacing, SPACINGS, "--compare='torch'")
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
