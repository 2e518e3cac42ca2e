"""Cached text: the states of frozen text encoders as a column of the cache of latents, and training
that reads no encoder.
"""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALLEST, config_dict, random_params
from flax import nnx
from latent_runs import config_of
from PIL import Image
from torch_models import clip_tokenizer, randomised, stable_diffusion_xl, t5_encoder
from torch_sd3 import MEDIUM, stable_diffusion_3

from contextdiff_jax import Pipeline
from contextdiff_jax.data import make_source
from contextdiff_jax.data.latent_shards import read_cache, read_texts
from contextdiff_jax.models.captions import Captions
from contextdiff_jax.models.frozen_text import KnownTexts, encoded
from contextdiff_jax.models.vae import VAE, VAEConfig
from contextdiff_jax.parallel.mesh import Feed, make_mesh, state_shardings
from contextdiff_jax.pretrained import save_vae
from contextdiff_jax.runs import frozen as frozen_networks
from contextdiff_jax.runs.frozen import load_frozen, text_key
from contextdiff_jax.runs.model import build_model, model_graph
from contextdiff_jax.runtime.pictures import caption_grid
from contextdiff_jax.settings import parse, to_config
from contextdiff_jax.training.cached_text import captions_of, frozen_for_training
from contextdiff_jax.training.latent_cache import Encoders, write_cache
from contextdiff_jax.training.loop import null_caption, open_data, train
from contextdiff_jax.training.step import draw, loss_fn

CAPTIONS = ["a red circle", "", "red", "b c d e f g h i j k l m", "the red cat", "a dog"]
# bash launch/test.sh -m slow tests/test_cached_text.py
KINDS = ["t5", "clip", "sd3", pytest.param("sdxl", marks=pytest.mark.slow)]


def clip_text(folder):
    """A tiny CLIPTextModel and its tokenizer, 16 wide."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=56,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=9,
        eos_token_id=55,
    )
    clip_tokenizer(folder).save_pretrained(folder)
    randomised(transformers.CLIPTextModel(config)).save_pretrained(folder)


class Case:
    """A kind of text encoder: its config on pictures, and on a cache of them."""

    def __init__(self, kind, folder):
        self.kind, self.folder = kind, folder
        rng, pictures = np.random.default_rng(0), folder / "pictures"
        pictures.mkdir()
        for i in range(len(CAPTIONS)):
            image = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(image).save(pictures / f"{i}.png")
        rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(CAPTIONS)]
        (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.encoder = folder / "text"
        if kind in ("t5", "clip"):
            {"t5": t5_encoder, "clip": clip_text}[kind](self.encoder)
            levels = dict(
                block_out_channels=(8, 16),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            )
            vae = VAE(VAEConfig(**levels, norm_num_groups=4), rngs=nnx.Rngs(0))
            save_vae(vae, folder / "vae")
        elif kind == "sd3":
            stable_diffusion_3(folder / "words", transformer=MEDIUM).save_pretrained(self.encoder)
        else:
            stable_diffusion_xl(folder / "words").save_pretrained(self.encoder)

    def settings(self, cached=False, **changes):
        path = self.folder / "cache" if cached else self.folder / "pictures"
        data = {"data.source": "cache" if cached else "folder", "data.path": str(path)}
        data |= {"train.batch_size": 4, "train.caption_dropout": 0.5} | changes
        if self.kind in ("sdxl", "sd3"):
            more = {"text.t5_length": 12} if self.kind == "sd3" else {}
            return parse(config_of(self.encoder, **more | data))
        latent = {"latent.vae": str(self.folder / "vae"), "model.in_channels": 4}
        latent |= {"model.out_channels": 4, "data.max_length": 9}
        text = {"text.pretrained": str(self.encoder), "data.tokenizer": str(self.encoder)}
        return parse(config_dict(**SMALLEST | latent | text | data))

    def write(self, **options):
        options = {"text_dtype": "float32", "dtype": "float32"} | options
        return write_cache(
            self.settings(), self.folder / "cache", shard_size=4, batch_size=3, **options
        )


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """By kind, each made once, with its cache."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = Case(kind, tmp_path_factory.mktemp(kind))
            made[kind].write()
        return made[kind]

    return of


def first_batch(settings):
    """(a batch with its randomness, the empty caption) as a run opens them."""
    feed = Feed(make_mesh(settings.mesh), settings.train.batch_size)
    tokenizer, loader = open_data(settings, feed)
    batch = next(loader)
    loader.close()
    del batch["caption"]
    return draw(jax.random.key(0), batch, settings), null_caption(
        tokenizer, settings.data.max_length
    )


class WithText:
    """As much of a model as reads captions."""

    def __init__(self, text, dtype=jnp.float32):
        self.text = text
        self.backbone = type("B", (), {"precision": type("P", (), {"compute": dtype})})

    def encode(self, ids, mask):
        return encoded(self.text, jnp.asarray(ids), jnp.asarray(mask))


@pytest.mark.parametrize("kind", KINDS)
def test_cached_states_are_the_encoders_and_the_encoder_is_not_read(kind, cases, monkeypatch):
    """Of captions of all lengths, of the empty one, of the prompts, and what networks ask of it."""
    case = cases(kind)
    settings = case.settings(cached=True)
    encoder = load_frozen(settings).text
    monkeypatch.setattr(frozen_networks, "_read_text", None)
    mesh = make_mesh(settings.mesh)
    known = frozen_for_training(settings, lambda a: state_shardings(mesh, a)).text
    batch, null = first_batch(settings)
    assert "latent_mean" in batch and "image" not in batch
    found = captions_of(WithText(known), batch)
    wanted = WithText(encoder).encode(batch["token_ids"], batch["token_mask"])
    empty = WithText(known).encode(null["token_ids"], null["token_mask"])
    for ours, theirs in (
        (found, wanted),
        (empty, WithText(encoder).encode(null["token_ids"], null["token_mask"])),
    ):
        np.testing.assert_allclose(ours.tokens, theirs.tokens, atol=1e-5)
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        assert (ours.pooled is None) == (theirs.pooled is None)
        if theirs.pooled is not None:
            np.testing.assert_allclose(ours.pooled, theirs.pooled, atol=1e-5)
    assert np.abs(wanted.tokens).max() > 0.1
    for name in ("width", "pooled_width", "reads_padding", "zeros_for_empty"):
        assert getattr(known, name) == getattr(encoder, name), name
    assert known.shapes(9) == encoder.shapes(settings.data.max_length)
    other = np.asarray(batch["token_ids"])[:1] + 1
    assert np.isnan(WithText(known).encode(other, batch["token_mask"][:1]).tokens).all()


def check_step(case, monkeypatch):
    """Loss and gradients on pictures with the encoder, and from the cache without it."""
    pixels, cached = case.settings(), case.settings(cached=True)
    graph, params, found = model_graph(pixels), random_params(pixels), []
    for settings in (pixels, cached):
        frozen = frozen_for_training(settings)
        batch, null = first_batch(settings)
        assert batch["dropped"].any() and not batch["dropped"].all()

        def loss(params, frozen, batch, null=null, settings=settings):
            model = build_model(graph, params, frozen)
            return loss_fn(model, batch, null, settings.process, settings)[0]

        found.append(jax.jit(jax.value_and_grad(loss))(params, frozen, batch))
        monkeypatch.setattr(frozen_networks, "_read_text", None)  # not from the cache on
    (loss, gradient), (other, others) = found
    assert loss > 0.1
    np.testing.assert_allclose(loss, other, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(ours).max()))


def test_a_step_from_the_cache_is_the_step_with_the_encoder_in_memory(cases, monkeypatch):
    check_step(cases("clip"), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "sdxl", "sd3"])
def test_so_it_is_with_every_kind_of_encoder(kind, cases, monkeypatch):
    check_step(cases(kind), monkeypatch)


@pytest.mark.slow
def test_a_run_without_the_encoder_shows_what_it_samples_with_it(cases, monkeypatch, tmp_path):
    case, prompts = cases("clip"), CAPTIONS
    changes = {"train.steps": 2, "train.sample_every": 2, "train.checkpoint_every": 2}
    settings = case.settings(cached=True, **changes)
    with monkeypatch.context() as patched:
        patched.setattr(frozen_networks, "_read_text", None)
        train(settings, to_config(settings), tmp_path)
    drawn = Pipeline.open(tmp_path).text_to_image(prompts, seed=settings.seed)
    shown = np.asarray(Image.open(tmp_path / "samples" / "00000002.png")).astype(int)
    wanted = np.asarray(caption_grid(drawn, prompts, columns=4)).astype(int)
    assert drawn.std() > 5 and np.abs(shown - wanted).max() <= 2


def test_a_run_s_prompts_come_from_the_cache_or_are_refused(cases, monkeypatch):
    case = cases("clip")
    monkeypatch.setattr(frozen_networks, "_read_text", None)  # isn't called
    shown = {"train.sample_every": 5}
    known = frozen_for_training(case.settings(cached=True, **shown)).text
    assert known.ids.shape[0] == 1 + len(CAPTIONS)  # the records that it shows
    assert read_texts(case.folder / "cache")[0] == [""]
    other = {"sample.prompts": ("a red dog",)}
    with pytest.raises(ValueError, match="has no states of 'a red dog'; cache_latents with these"):
        frozen_for_training(case.settings(cached=True, **shown | other))
    assert frozen_for_training(case.settings(cached=True, **other)).text.ids.shape[0] == 1


def test_more_prompts_are_added_to_a_cache_that_is_complete(cases, tmp_path):
    case = cases("clip")
    shutil.copytree(case.folder / "cache", tmp_path / "cache")
    settings = case.settings(**{"sample.prompts": ("a red dog",)})
    options = {"shard_size": 4, "dtype": "float32", "text_dtype": "float32"}
    assert write_cache(settings, tmp_path / "cache", **options)[1] == 0
    texts, arrays, _ = read_texts(tmp_path / "cache")
    assert texts == ["", "a red dog"] and arrays["text_states"].shape == (2, 9, 16)


def test_a_run_in_pixels_has_a_cache_of_its_pictures_and_states(cases, monkeypatch, tmp_path):
    case, out = cases("t5"), tmp_path / "cache"
    pixels = {"latent.vae": "", "model.in_channels": 3, "model.out_channels": 3}
    settings = case.settings(**pixels)
    cache, new = write_cache(settings, out, shard_size=4, batch_size=3, text_dtype="float32")
    assert new == 2 and cache.shape == (16, 16, 3) and cache.vae == {}
    cached = case.settings(cached=True, **pixels | {"data.path": str(out)})
    monkeypatch.setattr(frozen_networks, "_read_text", None)
    (batch, _), (wanted, _) = first_batch(cached), first_batch(settings)
    assert batch["image"].dtype == np.uint8 and "latent_mean" not in batch
    for name in wanted:
        np.testing.assert_array_equal(batch[name], wanted[name])
    latents = make_source(case.settings(cached=True).data)
    rows = {latents[i]["caption"]: latents[i]["text_states"] for i in range(len(latents))}
    for record in (make_source(cached.data)[i] for i in range(len(CAPTIONS))):
        np.testing.assert_allclose(record["text_states"], rows[record["caption"]], atol=1e-6)
    assert frozen_for_training(cached).vae is None
    with pytest.raises(ValueError, match="data.path=.* is another autoencoder's"):
        first_batch(case.settings(cached=True, **{"data.path": str(out)}))
    with pytest.raises(ValueError, match="latent.vae='': a cache needs the autoencoder's folder"):
        write_cache(settings, tmp_path / "x")


def test_a_cache_of_another_encoder_is_refused(cases, tmp_path):
    case = cases("clip")
    other = tmp_path / "other"
    shutil.copytree(case.encoder, other)
    assert (
        text_key(str(other))
        == text_key(str(case.encoder))
        == read_cache(case.folder / "cache").text["key"]
    )
    weights = other / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    message = "the cache in data.path=.* holds the states of another text encoder"
    with pytest.raises(ValueError, match=message):
        first_batch(case.settings(cached=True, **{"text.pretrained": str(other)}))
    shutil.copy(case.encoder / "model.safetensors", weights)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert text_key(str(other)) != text_key(str(case.encoder))
    options = {"shard_size": 4, "dtype": "float32"}
    with pytest.raises(ValueError, match="holds another cache, text is"):
        write_cache(case.settings(), case.folder / "cache", **options)
    with pytest.raises(ValueError, match="holds another cache, text is"):
        write_cache(case.settings(), case.folder / "cache", **options, text_dtype="float16")


def test_half_precision_states_are_rounded_and_what_it_does_not_hold_is_refused(cases, tmp_path):
    case = cases("t5")
    cached = make_source(case.settings(cached=True).data)
    whole, out = cached[3]["text_states"], tmp_path / "cache"
    write_cache(case.settings(), out, batch_size=3, text_dtype="float16")
    half = make_source(case.settings(cached=True, **{"data.path": str(out)}).data)[3]
    assert half["text_states"].dtype == np.float16 and whole.dtype == np.float32
    np.testing.assert_array_equal(half["text_states"], whole.astype(np.float16))
    large = Captions(np.full((1, 2, 3), 1e5, np.float32), np.ones((1, 2), bool))
    facts = {"reads_padding": False, "zeros_for_empty": False, "pooled_width": 3}
    text = KnownTexts(np.zeros((1, 2), np.int32), large, **facts)
    encoders = Encoders(None, None, "float16", text, "float16")
    with pytest.raises(ValueError, match="text_states aren't finite in it; float32 holds"):
        encoders.states(np.zeros((1, 2), np.int32), np.ones((1, 2), bool), 1)
    (out / "texts.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="texts.safetensors: can't be read"):
        frozen_for_training(case.settings(cached=True, **{"data.path": str(out)}))
    with pytest.raises(ValueError, match="this config trains its own"):
        trains = {"text.pretrained": "", "data.tokenizer": "", "text.width": 16}
        write_cache(case.settings(**trains), tmp_path / "x", text_dtype="float16")
