"""A fine-tuned run as a diffusers folder: the pipeline that it started from, with what was trained.

    TARGET/unet/                 the trained network (EMA, float32), without our context head;
                                 transformer/ of Stable Diffusion 3
    TARGET/lora.safetensors      a LoRA run's, in diffusers' names; unet/ is then the one that it
                                 started from
    TARGET/context.safetensors   ours: the relational network and the context head, by dotted path
    TARGET/context.json          the config of the relational network and its use

Everything else is copied (of a single-file checkpoint: written out). `model.pretrained=TARGET`
starts from the context too.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from contextdiff_jax.models.backbones import Backbone, build_backbone
from contextdiff_jax.models.lora import lora_layers
from contextdiff_jax.models.undrawn import Undrawn
from contextdiff_jax.pretrained import folder as folders
from contextdiff_jax.pretrained.conversion import backbone_model, complete_or_absent, copy_folder
from contextdiff_jax.pretrained.folder_files import FolderTensors, read_json, save_tensors
from contextdiff_jax.pretrained.lora import LoraLayer, save_lora
from contextdiff_jax.pretrained.names import Entry, name_map
from contextdiff_jax.pretrained.pipeline_folder import encoder_names, is_pipeline, read_index
from contextdiff_jax.pretrained.scheduler import CONFIG_FILE as SCHEDULER_FILE
from contextdiff_jax.runs.reading import Run, load_run
from contextdiff_jax.runtime.files import write_json
from contextdiff_jax.runtime.hub import find
from contextdiff_jax.training.trainable import of_context

CONTEXT_FILE, LORA_FILE, CONTEXT_CONFIG = "context.safetensors", "lora.safetensors", "context.json"


def is_run(folder: Path) -> bool:
    """Whether `folder` is a training run's workdir."""
    return (folder / "checkpoints").is_dir()


def export_run(source: Path, target: Path, report: Callable[[str], None] = print) -> None:
    """Writes the run's newest EMA weights; `target` is complete or isn't there.

    Raises ValueError for a run that didn't start from a pipeline's folder, or a target that holds
    something.
    """
    run = load_run(str(source), merged=False)
    if not run.settings.pretrained:
        raise ValueError(
            f"--source={source}: has no model.pretrained; only what began as a diffusers folder "
            "goes back to one"
        )
    origin = Path(find(run.settings.pretrained))
    with complete_or_absent(target) as partial:
        copy_folder(origin, partial)
        for name in (CONTEXT_FILE, CONTEXT_CONFIG, LORA_FILE):
            (partial / name).unlink(missing_ok=True)
        for name, folder in _frozen_folders(run).items():
            if folder.resolve() != (origin / name).resolve():
                shutil.rmtree(partial / name)
                copy_folder(folder, partial / name)
        network, model = _network(run), backbone_model(run.settings.model)
        if run.settings.train.trainable == "full":
            values = read_json(origin / network.name / folders.CONFIG_FILE, "the network's config")
            shutil.rmtree(partial / network.name)
            folders.save(model, network, partial / network.name, values)
        layers = _lora(run, name_map(network, model.rules(network.config)))
        if layers:
            save_lora({network.name: layers}, partial / LORA_FILE)
        _write_context(run, partial)
        _write_scheduler(run, partial / "scheduler" / SCHEDULER_FILE)
        report(f"step {run.step}: {', '.join(sorted(path.name for path in partial.iterdir()))}")


def context_state(folder: Path) -> nnx.State | None:
    """The parameters in TARGET/context.safetensors, under their paths in a model; None if there is
    no such file.
    """
    if not (folder / CONTEXT_FILE).is_file():
        return None
    tensors = FolderTensors(folder, CONTEXT_FILE)
    return nnx.from_flat_state(
        (
            tuple(int(key) if key.isdigit() else key for key in name.split(".")),
            nnx.Param(np.asarray(tensors[name])),
        )
        for name in tensors
    )


def _frozen_folders(run: Run) -> dict[str, Path]:
    """The folders that the run's frozen networks were read from, by their names in a pipeline."""
    text = Path(run.settings.text.pretrained)
    names = encoder_names(read_index(text)) if is_pipeline(text) else ()
    texts = {name: text / name for name in names} or {"text_encoder": text}
    return {"vae": Path(run.settings.latent.vae), **texts}


def _network(run: Run) -> Backbone:
    """The trained network without its context head."""
    config = dataclasses.replace(run.settings.model, context_head=False)
    network = nnx.eval_shape(lambda: build_backbone(config, rngs=Undrawn()))
    flat = nnx.to_flat_state(run.params[network.name])
    flat = [item for item in flat if item[0][0] != "context_head"]
    nnx.update(network, nnx.from_flat_state(flat))
    return network


def _lora(run: Run, entries: Mapping[str, Entry]) -> dict[str, LoraLayer]:
    """torch name of a layer -> its change, alpha being the rank."""
    changes, found = lora_layers(run.params), {}
    for name, entry in entries.items():
        if entry.path[-1] != "kernel" or entry.path[:-1] not in changes:
            continue
        down, up = map(np.asarray, changes[entry.path[:-1]])
        if entry.layer is not None:
            down, up = down[entry.layer], up[entry.layer]
        found[name.removesuffix(".weight")] = LoraLayer(down.T, up.T, float(down.shape[1]))
    return found


def _write_context(run: Run, folder: Path) -> None:
    tensors = {
        ".".join(map(str, path)): np.array(jax.device_get(leaf.get_value()), order="C")
        for path, leaf in nnx.to_flat_state(run.params)
        if of_context(path)
    }
    if tensors:
        save_tensors(tensors, folder / CONTEXT_FILE)
        write_json(
            folder / CONTEXT_CONFIG, dataclasses.asdict(run.settings.context), sort_keys=True
        )


def _write_scheduler(run: Run, path: Path) -> None:
    """A run with a rescaled schedule says so; else the folder's scheduler stays as it is."""
    values = read_json(path, "a pipeline's scheduler folder")
    if run.settings.diffusion.zero_terminal_snr and not values.get("rescale_betas_zero_snr"):
        changed = {
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "steps_offset": 0,
            "set_alpha_to_one": True,
        }
        write_json(path, values | changed, sort_keys=True)
