"""The configs in configs/: each loads and is accepted, or says which of the folders that it needs
is not there.
"""

import importlib

import pytest
from conftest import ROOT, config_dict

from configs.edit_shapes import video_sections
from contextdiff_jax.editing.settings import parse_edit
from contextdiff_jax.pretrained.finetuning import adopt
from contextdiff_jax.settings import parse
from contextdiff_jax.settings.autoencoder import parse_autoencoder
from contextdiff_jax.settings.train import LOGGED
from contextdiff_jax.training.log import averages, speed
from contextdiff_jax.training.state import zero_metrics

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
NEEDS_A_FOLDER = ("emoji_latent", "sd15_latent", "sd21_latent")  # an autoencoder's, or a pipeline's


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_accepted(name):
    module = importlib.import_module(f"configs.{name}")
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
