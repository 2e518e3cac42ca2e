"""The configs in configs/: each loads and is accepted, or says which of the folders that it needs
is not there.
"""

import importlib

import pytest
from absl import flags
from conftest import ROOT, config_dict
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from contextdiff_jax.configs import shapes_flow
from contextdiff_jax.configs.base import get_config
from contextdiff_jax.configs.edit_shapes import video_sections
from contextdiff_jax.editing.settings import parse_edit
from contextdiff_jax.pretrained.finetuning import adopt
from contextdiff_jax.settings import default_config, parse
from contextdiff_jax.settings.autoencoder import parse_autoencoder
from contextdiff_jax.settings.train import LOGGED
from contextdiff_jax.training.log import averages, speed
from contextdiff_jax.training.state import zero_metrics

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
# An autoencoder's, or a pipeline's.
NEEDS_A_FOLDER = ("emoji_latent", "sd15_latent", "sd21_latent", "sd3_latent", "sdxl_latent")


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_accepted(name):
    module = importlib.import_module(f"contextdiff_jax.configs.{name}")
    assert f"--config=configs/{name}.py" in module.__doc__ or name == "base"
    config = module.get_config().to_dict()
    if name.startswith("edit_"):
        parse_edit(config)
    elif name in NEEDS_A_FOLDER:
        with pytest.raises(ValueError, match="config.json|model_index.json: no such file"):
            parse(adopt(config))
    elif name == "vae_emoji":
        parse_autoencoder(config)
    else:
        parse(config)


@pytest.mark.parametrize("method", shapes_flow.METHODS)
def test_every_method_on_the_straight_path_is_accepted(method):
    settings = parse(shapes_flow.get_config(method).to_dict())
    assert settings.process.schedule.continuous
    assert settings.process.estimates_context == (method not in ("velocity", "csfm"))
    with pytest.raises(ValueError, match="csfm"):
        shapes_flow.get_config(method + "?")


def test_base_has_the_dataclasses_defaults_but_for_a_few():
    """A run is reproduced by its command only as long as these stay as they are."""
    base, defaults = (
        flatten_dict(config, sep=".") for config in (get_config().to_dict(), default_config())
    )
    assert {name: v for name, v in base.items() if (name, v) not in defaults.items()} == {
        "seed": 0,
        "model.in_channels": 3,
        "model.out_channels": 3,
        "model.block_out_channels": (32, 64, 128),
        "model.layers_per_block": 1,
        "model.down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "model.up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "model.attention_head_dim": 4,
        "model.cross_attention_dim": 128,
        "model.norm_num_groups": 16,
        "mesh.rules.batch": "data,fsdp",
        "mesh.rules.rows": "sequence",
        "mesh.rules.width": "fsdp",
        "mesh.rules.heads": "tensor",
        "mesh.rules.hidden": "tensor",
        "mesh.rules.channels": "tensor",
        "mesh.rules.vocab": "",
    }
    assert defaults.keys() <= base.keys()
    assert (base["context.max_gain"], base["data.num_objects"]) == (0.2, (1, 1))
    assert not {"context.in_channels", "model.context_head"} & base.keys()  # parse fills them in


def test_every_field_that_the_docs_name_is_set_by_a_flag():
    argv = [
        "train",
        f"--config={ROOT}/configs/base.py",
        "--config.data.num_scenes=7",
        "--config.data.scene_seed=3",
        "--config.data.backgrounds=('dark','light')",
        "--config.model.addition_embed_type=text_time",
        "--config.model.transformer_layers_per_block=2",
    ]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    data, model = config.value.data, config.value.model
    assert (data.num_scenes, data.scene_seed) == (7, 3)
    assert data.backgrounds == ("dark", "light")
    assert (model.addition_embed_type, model.transformer_layers_per_block) == ("text_time", 2)


NAN = float("nan")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("seed", -1, "must lie in 0..18446744073709551615"),
        ("seed", "0", "must be a whole number"),
        ("data.seed", 2**64, "must lie in 0..18446744073709551615"),
        ("train.steps", 0, "must be at least 1"),
        ("train.steps", "100", "must be of type int"),
        ("train.steps", True, "must be of type int"),
        ("train.batch_size", -8, "must be at least 1"),
        ("train.learning_rate", -1e-3, "must be at least 0"),
        ("train.learning_rate", NAN, "must be a finite number"),
        ("train.clip_norm", float("inf"), "must be a finite number"),
        ("train.b2", 1.0, r"must lie in \[0, 1\)"),
        ("train.best_metric", "losss", "unknown; one of loss, denoise_loss"),
        ("data.image_size", -16, "must be at least 1"),
        ("data.num_objects", "(1, 3)", "must be of type tuple"),
        ("data.max_broken_fraction", 2.0, r"must lie in \[0, 1\]"),
        ("sample.guidance", NAN, "must be a finite number"),
        ("sample.prompts", ("a", 2), "must be of type tuple"),
        ("sample.steps", 51, "sample.steps=51: must lie in 1..50"),
        ("sample.spacing", "even", "unknown; one of leading"),
        ("model.norm_num_groups", 0, "must be at least 1"),
        ("model.layers_per_block", "2", "must be of type"),
        ("model.block_out_channels", 8, "must be of type"),
        ("mesh.rules", "batch", "must be of type .*Mapping"),
        ("train", 5, "must be a section"),
        ("model", None, "must be a section"),
    ],
)
def test_a_value_that_is_none_is_named_before_anything_is_done(field, value, message):
    config = config_dict()
    section, _, name = field.partition(".")
    config = config | {section: config[section] | {name: value} if name else value}
    with pytest.raises(ValueError, match=message) as error:
        parse(config)
    assert field.split(".")[-1] in str(error.value) and "\n" not in str(error.value)


def test_one_text_is_one_prompt():
    """The comma of ('a dog',) is easily forgotten."""
    config = config_dict() | {"sample": config_dict()["sample"] | {"prompts": "a dog"}}
    assert parse(config).sample.prompts == ("a dog",)
    config = config_dict() | video_sections()
    config["video"] |= dict(path="x", prompt="a cat", edit_prompts="a dog")
    assert parse_edit(config).video.edit_prompts == ("a dog",)


def test_the_best_metric_is_one_that_a_run_logs():
    logged = averages(zero_metrics()).keys() | speed(8, 1.0, 1, None).keys()
    assert logged | {"learning_rate", "broken_records"} | {f"loss_q{i}" for i in range(1, 5)} == {
        *LOGGED
    }
