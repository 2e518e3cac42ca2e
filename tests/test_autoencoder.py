"""Training of an autoencoder: it learns, resumes, becomes a folder, and what is refused before."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ON_EIGHT, ROOT
from PIL import Image
from torch_models import nchw

from contextdiff_jax.settings.autoencoder import parse_autoencoder
from contextdiff_jax.training.autoencoder import train_autoencoder


def vae_config(folder, **train):
    from contextdiff_jax.configs.vae_emoji import get_config

    config = get_config()
    config.train.update(steps=30, batch_size=4, log_every=10, checkpoint_every=10, **train)
    config.data.update(source="emoji", path=str(folder), image_size=16)
    config.vae.update(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    return config.to_dict()


def test_an_autoencoder_learns_resumes_and_is_a_diffusers_folder_with_unit_latents(tmp_path):
    import diffusers

    rng = np.random.default_rng(0)
    rows = []
    for i in range(24):
        colour = rng.integers(0, 256, 3)
        Image.fromarray(np.broadcast_to(colour.astype(np.uint8), (16, 16, 3)).copy()).save(
            tmp_path / f"{i}.png"
        )
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) + "\n")
    (tmp_path / "metadata_train.jsonl").write_text("".join(rows[:20]))
    (tmp_path / "metadata_test.jsonl").write_text("".join(rows[20:]))
    config, workdir = vae_config(tmp_path), tmp_path / "vae_run"
    report = train_autoencoder(parse_autoencoder(config), config, workdir)
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    assert [row["step"] for row in log] == [10, 20, 30] and log[-1]["l1"] < 0.8 * log[0]["l1"]
    assert (workdir / "reconstructions.png").exists()
    # Trained already: the same command measures the same, whatever part of a checkpoint was copied.
    (workdir / "checkpoints" / "99").mkdir()
    assert train_autoencoder(parse_autoencoder(config), config, workdir) == report
    assert (workdir / "damaged" / "99").exists()
    theirs = diffusers.AutoencoderKL.from_pretrained(workdir / "vae")
    assert theirs.config.scaling_factor == report["scaling_factor"]
    pixels = np.stack(
        [np.asarray(Image.open(tmp_path / f"{i}.png"), np.float32) / 127.5 - 1 for i in range(20)]
    )
    with torch.no_grad():
        q = theirs.encode(nchw(pixels)).latent_dist
    std = float((q.mean.var() + q.var.mean()).sqrt()) * theirs.config.scaling_factor
    assert abs(std - 1) < 0.02


def test_devices_that_share_rows_and_channels_take_the_step_that_one_takes():
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "autoencoder_mesh_program.py"],
        env=os.environ | ON_EIGHT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    np.testing.assert_allclose(found["many"], found["one"], rtol=1e-5)


@pytest.mark.parametrize(
    "heldout, message",
    [
        (None, "data.heldout_metadata='metadata_test.jsonl'|metadata_test.jsonl"),
        ("", "holds no records"),
        ('{"file_name": "none.png", "text": "a"}\n', "1 of 1 records are broken"),
    ],
)
def test_an_autoencoder_without_held_out_pictures_is_refused_before_its_training(
    tmp_path, heldout, message
):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    row = json.dumps({"file_name": "a.png", "text": "red"}) + "\n"
    (tmp_path / "metadata_train.jsonl").write_text(30 * row)
    if heldout is not None:
        (tmp_path / "metadata_test.jsonl").write_text(heldout)
    config = vae_config(tmp_path)
    with pytest.raises(ValueError, match=message):
        train_autoencoder(parse_autoencoder(config), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
