"""The cache of latents: what it holds, that it is complete or refused, and that training from it is
training on pictures.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import command, config_dict
from flax import nnx
from PIL import Image

from contextdiff_jax.data import DataConfig, load_tokenizer, make_loader, make_source
from contextdiff_jax.data.identity import content_key
from contextdiff_jax.data.latent_shards import CacheSource, claim_cache, read_cache
from contextdiff_jax.evaluation.subject import splits
from contextdiff_jax.models.vae import VAE, VAEConfig
from contextdiff_jax.parallel.mesh import Feed, make_mesh
from contextdiff_jax.pretrained import save_vae
from contextdiff_jax.runs.frozen import load_frozen
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.settings import parse
from contextdiff_jax.training.latent_cache import write_cache
from contextdiff_jax.training.loop import null_caption, open_data
from contextdiff_jax.training.state import init_state
from contextdiff_jax.training.step import draw, loss_fn

COUNT = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures with captions, and in vae/ an autoencoder with 8x8x4 latents."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(
            folder / f"{i}.png"
        )
    rows = [
        json.dumps({"file_name": f"{i}.png", "text": f"picture {i} é" if i else ""}) + "\n"
        for i in range(COUNT)
    ]
    (folder / "metadata.jsonl").write_text("".join(rows))
    levels = dict(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    save_vae(
        VAE(VAEConfig(**levels, norm_num_groups=4, scaling_factor=1.7), rngs=nnx.Rngs(0)),
        folder / "vae",
    )
    return folder


def settings_of(folder, **changes):
    latent = {
        "latent.vae": str(folder / "vae"),
        "model.in_channels": 4,
        "model.out_channels": 4,
        "train.batch_size": 4,
    }
    return parse(
        config_dict(**latent | {"data.source": "folder", "data.path": str(folder)} | changes)
    )


@pytest.fixture(scope="module")
def cached(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    cache, new = write_cache(settings_of(folder), path, shard_size=4, batch_size=3, dtype="float32")
    assert (cache.num_shards, new) == (3, 3)
    return path


def test_records_are_the_autoencoders_moments_with_tokens_and_captions(folder, cached):
    settings = settings_of(folder)
    records, source = CacheSource(str(cached)), make_source(settings.data)
    assert len(records) == len(source) == COUNT
    vae = load_frozen(settings).vae
    for i in (0, 5, 9):
        record, picture = records[i], source[i]
        q = vae.encode(picture["image"][None].astype(np.float32) / 127.5 - 1)
        np.testing.assert_allclose(record["latent_mean"], q.mean[0], atol=1e-5)
        np.testing.assert_allclose(record["latent_std"] ** 2, np.exp(q.logvar[0]), rtol=1e-4)
        assert record["caption"] == picture["caption"]
        ids, mask = load_tokenizer().encode([picture["caption"]], 12)
        np.testing.assert_array_equal(record["token_ids"], ids[0])
        np.testing.assert_array_equal(record["token_mask"], mask[0])
    assert records[0]["caption"] == "" and "é" in records[1]["caption"]


def test_a_killed_run_goes_on_with_what_is_missing_and_half_a_shard_is_never_read(
    folder, cached, tmp_path
):
    names = sorted(path.name for path in cached.glob("*.array_record"))
    for name in ("cache.json", names[0]):
        (tmp_path / name).write_bytes((cached / name).read_bytes())
    (tmp_path / f"{names[1]}.partial").write_bytes((cached / names[1]).read_bytes()[:100])
    with pytest.raises(
        ValueError, match="1 of 3 shards are there; the same command as before goes on"
    ):
        CacheSource(str(tmp_path))
    before = (tmp_path / names[0]).stat().st_mtime_ns
    _, new = write_cache(settings_of(folder), tmp_path, shard_size=4, batch_size=3, dtype="float32")
    assert new == 2 and (tmp_path / names[0]).stat().st_mtime_ns == before
    whole, resumed = CacheSource(str(cached)), CacheSource(str(tmp_path))
    for i in range(COUNT):
        for a, b in zip(whole[i].values(), resumed[i].values(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_run_on_a_cache_is_evaluated_on_the_pictures_that_it_was_made_of(folder, cached):
    data = DataConfig(source="cache", path=str(cached), image_size=16, max_length=12)
    pictures = splits(data)["training records"]
    assert len(pictures) == COUNT and pictures[5]["image"].shape == (16, 16, 3)
    np.testing.assert_array_equal(
        pictures[5]["image"], make_source(settings_of(folder).data)[5]["image"]
    )
    assert data.kind.splits(data) == ("train",)


def open_loader(settings):
    """(tokenizer, loader) as a run of one process opens them."""
    return open_data(settings, Feed(make_mesh(settings.mesh), settings.train.batch_size))


@pytest.mark.slow  # bash launch/test.sh -m slow tests/test_cache.py
def test_the_loss_from_the_cache_is_the_loss_on_the_pictures(folder, cached):
    pixels, latents = (
        settings_of(folder),
        settings_of(folder, **{"data.source": "cache", "data.path": str(cached)}),
    )
    graph, params, frozen = (
        model_graph(pixels),
        jax.jit(lambda: init_state(pixels))().params,
        load_frozen(pixels),
    )
    losses = []
    for settings in (pixels, latents):
        tokenizer, loader = open_loader(settings)
        batch = next(loader)
        loader.close()
        assert ("image" in batch) == (settings is pixels)
        del batch["caption"]
        batch, null = (
            draw(jax.random.key(0), batch, settings),
            null_caption(tokenizer, settings.data.max_length),
        )
        process = settings.process

        def loss(batch, null=null, process=process, settings=settings):
            model = build_model(graph, params, frozen)
            return loss_fn(model, batch, null, process, settings)[0]

        losses.append(float(jax.jit(loss)(batch)))
    assert losses[0] > 0.1
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_half_precision_moments_are_those_of_float32_rounded(folder, cached, tmp_path):
    write_cache(settings_of(folder), tmp_path, shard_size=100, batch_size=3)
    half, full = CacheSource(str(tmp_path)), CacheSource(str(cached))
    assert half[3]["latent_mean"].dtype == np.float16
    np.testing.assert_array_equal(half[3]["latent_mean"], full[3]["latent_mean"].astype(np.float16))
    loader = make_loader(half, batch_size=4)
    assert next(loader)["latent_std"].shape == (4, 8, 8, 4)
    loader.close()


def test_a_cache_of_something_else_is_refused_in_one_line(folder, cached, tmp_path):
    cache = {"data.source": "cache", "data.path": str(cached)}
    with pytest.raises(ValueError, match="data.max_length=13: the cache in .* has 12"):
        open_loader(settings_of(folder, **cache | {"data.max_length": 13}))
    with pytest.raises(ValueError, match="a cache of the split 'train', not of 'heldout'"):
        make_source(settings_of(folder, **cache).data, "heldout")
    with pytest.raises(
        ValueError, match="holds another cache, dtype is 'float32' there and 'float16' here"
    ):
        write_cache(settings_of(folder), cached, shard_size=4)
    with pytest.raises(ValueError, match="holds no cache .no cache.json."):
        read_cache(tmp_path)
    with pytest.raises(ValueError, match="data.source='cache': holds latents; latent.vae"):
        pixels = {"latent.vae": "", "model.in_channels": 3, "model.out_channels": 3}
        open_loader(settings_of(folder, **cache | pixels))
    config = json.loads((folder / "vae" / "config.json").read_text())
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 1.0}))
    with pytest.raises(ValueError, match="the cache in .* is another autoencoder's"):
        open_loader(settings_of(folder, **cache | {"latent.vae": str(tmp_path / "vae")}))


@pytest.mark.parametrize("change", ["a caption", "a picture"])
def test_new_captions_or_pictures_never_mix_with_old_ones(change, folder, cached, tmp_path):
    source, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(folder, source, ignore=shutil.ignore_patterns("vae"))
    settings = settings_of(folder, **{"data.path": str(source)})
    cache = dataclasses.replace(read_cache(cached), source=dataclasses.asdict(settings.data))
    cache = dataclasses.replace(cache, content=content_key(make_source(settings.data)))
    claim_cache(out, cache)
    claim_cache(out, cache)  # as it was: goes on
    if change == "a caption":
        text = (source / "metadata.jsonl").read_text()
        (source / "metadata.jsonl").write_text(text.replace("picture 7", "picture 0"))
    else:
        Image.new("RGB", (16, 16)).save(source / "7.png")
    with pytest.raises(ValueError, match="was begun with other captions or pictures"):
        claim_cache(
            out, dataclasses.replace(cache, content=content_key(make_source(settings.data)))
        )


def test_a_cache_of_an_older_version_or_a_damaged_one_is_not_trusted(cached, tmp_path, caplog):
    shutil.copytree(cached, tmp_path / "old")
    old = json.loads((tmp_path / "old" / "cache.json").read_text())
    del old["content"]
    (tmp_path / "old" / "cache.json").write_text(json.dumps(old))
    with caplog.at_level("WARNING", logger="contextdiff_jax"):
        assert len(CacheSource(str(tmp_path / "old"))) == COUNT
    assert "did not notice records that change" in caplog.text
    with pytest.raises(ValueError, match="new ones would mix with old"):
        claim_cache(tmp_path / "old", read_cache(cached))
    shard = next((tmp_path / "old").glob("latents-00001*"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ValueError, match="is damaged|cannot be read") as error:
        source = CacheSource(str(tmp_path / "old"))
        for i in range(COUNT):
            source[i]
    assert "\n" not in str(error.value)
    (tmp_path / "old" / "cache.json").write_text("")
    with pytest.raises(ValueError, match="cache.json: is not a cache's"):
        read_cache(tmp_path / "old")


def test_the_command_refuses_a_config_of_pixels_in_one_line(tmp_path):
    run = command("cache_latents", "--config=configs/base.py", f"--out={tmp_path}")
    assert (
        run.returncode == 2
        and "error: latent.vae='': a cache needs the autoencoder's folder" in run.stderr
    ), run.stderr
