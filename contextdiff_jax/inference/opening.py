"""Opening of folders: a trained run, or a Stable Diffusion pipeline."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from contextdiff_jax import diffusion
from contextdiff_jax.data import AnyTokenizer
from contextdiff_jax.diffusion.process import Process
from contextdiff_jax.diffusion.steps import Steps
from contextdiff_jax.inference.opened import Opened
from contextdiff_jax.inference.pipeline import Pipeline
from contextdiff_jax.inference.sharing import write_folder, write_run
from contextdiff_jax.models.backbones import BACKBONES, kind_of
from contextdiff_jax.models.context import ContextConfig, RelationalNetwork
from contextdiff_jax.models.contextdiff import ContextDiffusion, Frozen
from contextdiff_jax.parallel.mesh import local_mesh, replicate, replicated
from contextdiff_jax.pretrained.pipeline import StableDiffusion, read_pipeline
from contextdiff_jax.pretrained.pipeline_folder import is_pipeline
from contextdiff_jax.pretrained.pipeline_sd3 import StableDiffusion3
from contextdiff_jax.pretrained.scheduler_steps import scheduler_steps
from contextdiff_jax.runs.frozen import load_frozen
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.runs.reading import load_run
from contextdiff_jax.runs.saved import UNTRAINED, Description
from contextdiff_jax.runtime.hub import find_model
from contextdiff_jax.settings import SampleConfig, Settings
from contextdiff_jax.settings.sampling import check_sampling

LOGGER = logging.getLogger(__name__)
AnyFolder = StableDiffusion | StableDiffusion3
Shape = tuple[int, int, int]


def open_folder(
    path: str | Path,
    weights: str = "ema",
    *,
    ema_length: float | None = None,
    programs: epath.PathLike | None = None,
    **options: Any,
) -> Pipeline:
    """See `Pipeline.open`. `programs`: a folder where traced programs are kept."""
    path = find_model(path)
    if "://" not in path and is_pipeline(path):
        if ema_length is not None:
            raise ValueError(f"--ema_length={ema_length}: {path} is no run, which alone has it")
        return open_stable_diffusion(path, programs, **options)
    if not (epath.Path(path) / "config.json").exists():
        raise ValueError(
            f"{path}: holds neither a trained run (config.json) nor a Stable Diffusion pipeline "
            "(model_index.json)"
        )
    run = load_run(path, weights, ema_length=ema_length)
    # Of a job's processes each samples by itself, on devices of its own.
    params = run.params if jax.process_count() == 1 else replicate(run.params)
    which = "" if ema_length is None else f", ema_length {ema_length:g}"
    return of_run(
        run.settings,
        run.tokenizer,
        params,
        mesh=local_mesh(),
        programs=programs,
        source=f"step {run.step} of {path}{which}",
        description=Description(step=run.step, weights=weights),
    )


def of_run(
    settings: Settings,
    tokenizer: AnyTokenizer,
    params: PyTree,
    *,
    options: SampleConfig | None = None,
    frozen: Frozen | None = None,
    mesh: Mesh | None = None,
    programs: epath.PathLike | None = None,
    source: str = "",
    description: Description = UNTRAINED,
) -> Pipeline:
    """The pipeline of a training run's parameters. The frozen networks are read from their folders
    unless they are given. `description`: of the parameters, for `Pipeline.save`.

    Raises ValueError for options that don't fit the schedule.
    """
    graph = functools.cache(functools.partial(model_graph, settings))
    options = options or settings.sample
    process = settings.process

    def find_steps(options: SampleConfig, shape: Shape | None = None) -> Steps:
        check_sampling(process, options)
        return run_steps(process.schedule, options)

    find_steps(options)
    frozen = load_frozen(settings) if frozen is None else frozen
    opened = Opened(
        build=lambda weights: build_model(graph(), *weights),
        weights=(params, frozen),
        process=process,
        encode_text=lambda texts: tokenizer.encode_and_cut(list(texts), settings.data.max_length),
        find_steps=find_steps,
        shape=settings.shape,
        factor=settings.data.image_size // settings.shape[0],
        multiple=settings.model.granularity,
        super_resolution=settings.super_resolution,
        piece=settings.data.crop_size * settings.shape[0] // settings.data.image_size,
        keeps_coarse=BACKBONES[kind_of(settings.model)].network.keeps_coarse,
        options=options,
        identity=settings,
        rules=settings.mesh.rules,
        zeros_for_empty=frozen.text is not None and frozen.text.zeros_for_empty,
        source=source,
        write=functools.partial(write_run, settings, description),
    )
    return Pipeline(opened, mesh, programs)


def run_steps(schedule: diffusion.Schedule, options: SampleConfig) -> Steps:
    """The times of a run's options. `steps_offset` and `set_alpha_to_one` are those of diffusers'
    schedulers: timesteps moved up, and an end at index 0 instead of clean data (DDIM).

    Raises ValueError for times outside the schedule, or those two on a path in continuous time.
    """
    times = options.times(schedule)
    if schedule.continuous:
        if options.steps_offset or not options.set_alpha_to_one:
            raise ValueError(
                f"sample.steps_offset={options.steps_offset}, "
                f"sample.set_alpha_to_one={options.set_alpha_to_one}: are for discrete schedules; "
                "only 0 and True"
            )
        return Steps(times)
    timesteps = options.steps_offset + times
    if timesteps[0] > schedule.t_max:
        raise ValueError(
            f"sample.steps_offset={options.steps_offset}: the first of {options.steps} steps is "
            f"{timesteps[0]}; must be below {schedule.num_timesteps}"
        )
    if options.set_alpha_to_one or options.sampler != "ddim":
        return Steps(timesteps)
    return Steps(timesteps, np.append(timesteps[1:], 0))


class FolderPipeline(Pipeline):
    """The pipeline of a Stable Diffusion folder. `model` holds its networks and tokenizers."""

    def __init__(self, opened: Opened, model: AnyFolder, **options: Any):
        super().__init__(opened, **options)
        self.model, self.scheduler, self.token_ids = model, model.scheduler, model.token_ids


def open_stable_diffusion(
    path: str | Path, programs: epath.PathLike | None = None, **options: Any
) -> FolderPipeline:
    """The pipeline in a Stable Diffusion folder. Parameters are held once: on all devices of this
    process, and in the type that products take, so that no program makes a copy in that type.
    """
    mesh = local_mesh()

    def everywhere(params: PyTree) -> PyTree:
        return jax.tree.map(lambda _: replicated(mesh), params)

    defaults = {"widen": True, "shardings": everywhere if mesh.size > 1 else None}
    return of_folder(read_pipeline(path, **defaults | options), str(path), programs)


def of_folder(
    folder: AnyFolder, source: str = "", programs: epath.PathLike | None = None
) -> FolderPipeline:
    """The pipeline of a Stable Diffusion folder: a model whose context is `none`."""
    context = RelationalNetwork(
        ContextConfig(kind="none", in_channels=folder.vae.config.latent_channels),
        rngs=nnx.Rngs(0),
    )
    model = ContextDiffusion(None, folder.backbone, context).attach(
        Frozen(folder.vae, folder.encoder)
    )
    graph, weights = nnx.split(model)
    mesh = local_mesh()
    if mesh.size > 1:
        weights = jax.device_put(weights, replicated(mesh))
    scheduler = folder.scheduler
    if scheduler.solver.note:
        LOGGER.warning("%s: %s", source or "scheduler", scheduler.solver.note)
    opened = Opened(
        build=lambda weights: nnx.merge(graph, *weights),
        weights=(weights,),
        process=Process(
            schedule=scheduler.schedule(), prediction_type=scheduler.prediction, shift="none"
        ),
        encode_text=folder.encode_text,
        find_steps=lambda options, shape=folder.latent_shape: _folder_steps(folder, options, shape),
        shape=folder.latent_shape,
        factor=folder.vae.config.downscale,
        options=SampleConfig(
            sampler=scheduler.solver.sampler,
            steps=folder.steps,
            guidance=folder.guidance,
            spacing="",  # the scheduler's own of each sampler
            steps_offset=scheduler.steps_offset,
            set_alpha_to_one=scheduler.set_alpha_to_one,
        ),
        identity=graph,
        multiple=folder.backbone.config.granularity,
        keeps_coarse=folder.backbone.keeps_coarse,
        only_inpaints=folder.backbone.config.in_channels != folder.vae.config.latent_channels,
        rounds_strength_up=folder.rounds_strength_up,
        text_length=folder.text_length,
        least_guidance=1.0,  # as diffusers, where a scale below 1 is none
        zeros_for_empty=folder.zeros_for_empty,
        source=source,
        write=functools.partial(write_folder, source),
    )
    mesh = mesh if mesh.size > 1 else None
    return FolderPipeline(opened, folder, mesh=mesh, programs=programs)


def _folder_steps(folder: AnyFolder, options: SampleConfig, shape: Shape) -> Steps:
    scheduler = dataclasses.replace(
        folder.scheduler,
        steps_offset=options.steps_offset,
        set_alpha_to_one=options.set_alpha_to_one,
    )
    tokens = math.prod(side // folder.backbone.config.granularity for side in shape[:2])
    grid = options.spacing, options.spacing_factor
    return scheduler_steps(scheduler, options.sampler, options.steps, *grid, tokens)
