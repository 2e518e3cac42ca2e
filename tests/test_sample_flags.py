"""The flags of the sample command, through its own `main`."""

from __future__ import annotations

import types

import command_flags
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from contextdiff_jax import Pipeline
from contextdiff_jax.runtime import host
from contextdiff_jax.runtime.pictures import read_png_metadata
from contextdiff_jax.settings import SampleConfig
from contextdiff_jax.settings.super_resolution import SuperResolutionConfig

SAMPLE = ROOT / "contextdiff_jax" / "sample.py"


def test_the_sample_commands_flags_reach_the_request(monkeypatch, tmp_path):
    """Two runs, the second guides the first; the pictures' texts say all that was asked for."""
    asked = {}

    class Opened:
        options = Pipeline.options

        def __init__(self, path, weights, **_):
            self.path, self.source, self.guide = path, path, None
            self.opened = types.SimpleNamespace(
                options=SampleConfig(),
                super_resolution=SuperResolutionConfig(factor=2 * (path == "UPSAMPLER")),
            )

        def guided_by(self, guide):
            self.guide = guide.path
            return self

        def text_to_image(self, prompts, **options):
            asked.update(options, guide=self.guide, path=self.path)
            return np.zeros((len(prompts), 8, 8, 3), np.uint8)

        def upsample(self, prompts, images, **options):
            asked.update(options, enlarged=images.shape)
            return np.zeros((len(images), 12, 8, 3), np.uint8)

    monkeypatch.setattr(Pipeline, "open", Opened)
    monkeypatch.setattr(host, "set_compilation_cache", lambda folder: None)
    places = [f"--out={tmp_path}/grid.png", f"--images={tmp_path}/each", "--prompt=a"]
    command_flags.run(
        SAMPLE,
        [
            *places,
            "--workdir=RUN",
            "--autoguidance=SMALL",
            "--guidance=2.5",
            "--guidance_rescale=0.4",
            "--guidance_interval=0.2,0.75",
            "--context_scale=0.8",
            "--dynamic_threshold=99",
        ],
    )
    expected = {
        "guidance": 2.5,
        "guidance_rescale": 0.4,
        "guidance_interval": (0.2, 0.75),
        "context_scale": 0.8,
        "dynamic_threshold": 99.0,
    }
    assert {name: asked[name] for name in expected} == expected
    assert (asked["path"], asked["guide"]) == ("RUN", "SMALL")
    texts = read_png_metadata(tmp_path / "each" / "0000.png")
    assert texts["guidance_interval"] == "(0.2, 0.75)" and texts["autoguidance"] == "SMALL"
    command_flags.run(SAMPLE, [*places, "--workdir=RUN", "--negative=b", "--perpendicular=0.5"])
    assert (asked["negative"], asked["perpendicular"], asked["guide"]) == ("b", 0.5, None)
    Image.new("RGB", (4, 6)).save(tmp_path / "small.png")
    enlarge = ["--workdir=UPSAMPLER", f"--image={tmp_path}/small.png", "--augmentation=0.3"]
    command_flags.run(SAMPLE, [*places, *enlarge, "--num=2"])
    assert (asked["enlarged"], asked["augmentation"]) == ((2, 6, 4, 3), 0.3)
    with pytest.raises(ValueError, match="--strength=0.5: an upsampler begins at noise"):
        command_flags.run(SAMPLE, [*places, *enlarge, "--strength=0.5"])


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--guidance_interval=0.2"], r"--guidance_interval=0.2: must be LOW,HIGH, as in 0.2,0.8"),
        (["--guidance_interval=a,b"], r"--guidance_interval=a,b: must be LOW,HIGH"),
        (["--guidance_interval=0.8,0.2"], r"guidance_interval=\(0.8, 0.2\): must be two shares"),
        (["--perpendicular=1"], "--perpendicular=1.0: needs --negative"),
        (
            ["--negative=b", "--autoguidance=DIR"],
            "--negative=b: isn't read with --autoguidance=DIR",
        ),
        (["--context_scale=-1"], "context_scale=-1.0: must be finite and not negative"),
    ],
)
def test_flags_of_guidance_that_do_not_fit_are_refused_in_one_line(flags, error):
    with pytest.raises(ValueError, match=f"^{error}") as raised:
        command_flags.run(SAMPLE, ["--workdir=RUN", "--prompt=a", *flags])
    assert "\n" not in str(raised.value)
