"""The configs in configs/: each loads and is accepted, or says which of the folders that it needs
is not there.
"""

import importlib

import pytest
from conftest import ROOT

from contextdiff_jax.editing.settings import parse_edit
from contextdiff_jax.pretrained.finetuning import adopt
from contextdiff_jax.settings import parse, parse_autoencoder

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
