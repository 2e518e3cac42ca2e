"""A folder's scheduler against diffusers' DDIM: its steps and schedule, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from contextdiff_jax.pretrained.scheduler import Scheduler, load_scheduler


@pytest.mark.parametrize("steps", [1, 6, 20, 50, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "more",
    [
        dict(),
        dict(
            steps_offset=1,
            set_alpha_to_one=False,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
        ),
        dict(
            beta_schedule="squaredcos_cap_v2",
            num_train_timesteps=1200,
            prediction_type="v_prediction",
        ),
        dict(rescale_betas_zero_snr=True, prediction_type="sample"),
    ],
)
def test_schedule_and_steps_equal_those_of_diffusers(tmp_path, steps, spacing, more):
    theirs = DDIMScheduler(clip_sample=False, timestep_spacing=spacing, **more)
    theirs.save_pretrained(tmp_path)
    theirs.set_timesteps(steps)
    ours = load_scheduler(tmp_path)
    timesteps, following = ours.steps(steps)
    np.testing.assert_array_equal(timesteps, theirs.timesteps.numpy())
    before = theirs.timesteps - theirs.config.num_train_timesteps // steps
    alphas = torch.where(
        before >= 0, theirs.alphas_cumprod[before.clamp(min=0)], theirs.final_alpha_cumprod
    )
    np.testing.assert_allclose(ours.schedule().alpha_bar(following), alphas, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(
        ours.schedule().alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(_class_name="FlowMatchScheduler"), "_class_name='FlowMatchScheduler': not supported"),
        (
            dict(beta_schedule="sigmoid"),
            "beta_schedule='sigmoid': unknown; one of linear, scaled_linear",
        ),
        (
            dict(prediction_type="flow"),
            "prediction_type='flow': unknown; one of epsilon, sample, v_prediction",
        ),
        (
            dict(timestep_spacing="log"),
            "timestep_spacing='log': unknown; one of leading, linspace, trailing",
        ),
        (dict(clip_sample=True), "clip_sample=True: not supported"),
        (dict(thresholding=True), "thresholding=True: not supported"),
        (dict(trained_betas=[0.1]), "trained_betas: not supported"),
        (
            dict(timestep_type="continuous", prediction_type="v_prediction"),
            "timestep_type='continuous' with",
        ),
    ],
)
def test_a_scheduler_that_is_not_supported_is_refused(tmp_path, change, message):
    values = dict(_class_name="DDIMScheduler", clip_sample=False) | change
    (tmp_path / "scheduler_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"scheduler_config.json: {message}"):
        load_scheduler(tmp_path)


def test_steps_after_the_schedules_end_are_refused():
    with pytest.raises(
        ValueError, match="steps=1000: with steps_offset=1 they start at 1000; must be below 1000"
    ):
        Scheduler(steps_offset=1).steps(1000)
