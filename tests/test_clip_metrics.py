"""CLIP's embeddings, CLIP score and CMMD against transformers' CLIPModel and CLIPProcessor, and
torchmetrics.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from references import gaussian_kernel, mmd2
from torch_models import clip_model, edit_config, randomised
from torchmetrics.functional.multimodal.clip_score import clip_score as torchmetrics_clip_score

from contextdiff_jax.evaluation import distances
from contextdiff_jax.evaluation.networks.clip import Preprocessing, load_clip

CAPTIONS = [
    "a red d",
    "red",
    "a large red cat",
    "b c d e f g h i j k l m",
    "z",
    "the red one",
    "q w e",
    "moon r",
]


def pictures(count, height=16, width=16, seed=0):
    """Smooth coloured patches with some noise, so that a resize's filter and its borders matter."""
    rng = np.random.default_rng(seed)
    coarse = np.kron(
        rng.integers(0, 256, (count, 4, 4, 3)), np.ones((1, -(-height // 4), -(-width // 4), 1))
    )
    return np.clip(
        coarse[:, :height, :width] + rng.normal(0, 12, (count, height, width, 3)), 0, 255
    ).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="module")
def torch_clip(folder):
    return clip_model(folder)


@pytest.fixture(scope="module")
def clip(torch_clip, folder):
    return load_clip(folder)


def torch_embeddings(torch_clip, images, captions):
    model, processor = torch_clip
    inputs = processor(
        text=captions, images=list(images), return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        output = model(**inputs)
    return output.image_embeds.double().numpy(), output.text_embeds.double().numpy()


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(
    "height, width", [(16, 16), (64, 48), (37, 90)], ids=["enlarged", "upright", "wide"]
)
def test_embeddings_are_transformers_for_pictures_that_are_enlarged_reduced_and_cropped(
    clip, torch_clip, height, width
):
    images = pictures(8, height, width)
    image, text = torch_embeddings(torch_clip, images, CAPTIONS)
    np.testing.assert_allclose(unit(clip.embed_images(images)), image, atol=1e-5)
    np.testing.assert_allclose(unit(clip.embed_captions(CAPTIONS)), text, atol=1e-5)
    # They tell pictures and texts apart.
    assert min(np.ptp(image, axis=0).min(), np.ptp(text, axis=0).min()) > 0.02


def test_clip_score_is_transformers_and_torchmetrics(clip, torch_clip):
    images = np.repeat(pictures(12, 40, 40, seed=1), len(CAPTIONS), axis=0)
    captions = CAPTIONS * 12
    ours = distances.clip_score(clip.embed_images(images), clip.embed_captions(captions))
    image, text = torch_embeddings(torch_clip, images, captions)
    cosines = (image * text).sum(1)
    positive = np.flatnonzero(cosines > 0.02)
    assert len(positive) >= 8 and (cosines < 0).any()
    np.testing.assert_allclose(ours[positive], 100 * cosines[positive], rtol=1e-3)
    assert not ours[cosines < 0].any()

    model, processor = torch_clip

    class Tensors:  # torchmetrics 1.9 expects what transformers 4 gave
        config = model.config

        def to(self, device):
            return self

        def get_image_features(self, pixels):
            return model.get_image_features(pixels).pooler_output

        def get_text_features(self, ids, mask):
            return model.get_text_features(ids, mask).pooler_output

    # torchmetrics cuts the end token off longer ones.
    short = [i for i in positive if len(captions[i]) < 10]
    with torch.no_grad():
        theirs = torchmetrics_clip_score(
            [torch.tensor(images[i]).permute(2, 0, 1) for i in short],
            [captions[i] for i in short],
            lambda: (Tensors(), processor),
        )
    assert len(short) >= 4 and ours[short].mean() == pytest.approx(float(theirs), rel=1e-3)


def test_cmmd_is_the_double_sum_over_transformers_embeddings(clip, torch_clip):
    first, second = pictures(14, 24, 24), 255 - pictures(18, 24, 24, seed=2) // 2
    ours = distances.cmmd(clip.embed_images(first), clip.embed_images(second)).value
    x, y = (torch_embeddings(torch_clip, images, ["a"])[0] for images in (first, second))
    expected = 1000 * mmd2(x, y, gaussian_kernel, False)
    assert expected > 0.1 and ours == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 17, "width": 20}},
        {"size": {"height": 21, "width": 18}, "do_center_crop": False, "resample": 2},
        {
            "do_resize": False,
            "crop_size": {"height": 41, "width": 20},
            "image_mean": [0.1, 0.2, 0.3],
        },
        {
            "size": {"shortest_edge": 9},
            "crop_size": {"height": 12, "width": 15},
            "do_normalize": False,
        },
        {"do_rescale": False, "image_std": [2.0, 3.0, 4.0]},
    ],
    ids=["crop", "square sides, bilinear", "cut and padded", "padded", "not rescaled"],
)
def test_every_setting_of_the_image_processor_is_honoured(options):
    images = pictures(3, 33, 52)
    processor = transformers.CLIPImageProcessor(**options)
    expected = processor(list(images), return_tensors="np").pixel_values.transpose(0, 2, 3, 1)
    ours = Preprocessing.from_dict(json.loads(processor.to_json_string()), 224)(images)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_settings_are_found_where_every_transformers_writes_them_and_default_to_the_model_s_size(
    clip, folder, tmp_path
):
    def loaded(**files):
        target = tmp_path / "-".join(files or ["none"])
        shutil.copytree(folder, target, ignore=lambda *_: ["processor_config.json"])
        for name, values in files.items():
            (target / f"{name}.json").write_text(json.dumps(values))
        return load_clip(target).preprocessing

    assert loaded() == clip.preprocessing
    old = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 24,
        "crop_size": 20,
        "resample": 2,
    }
    wanted = Preprocessing(size=24, crop_size=(20, 20), resample=2)
    assert loaded(preprocessor_config=old) == wanted
    assert loaded(processor_config={"image_processor": old}) == wanted


def without(name):
    return lambda folder: (folder / name).unlink()


def replaced(folder, name, **changes):
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            shutil.rmtree,
            "--clip=.*: no such folder; name one that transformers' CLIPModel was saved in",
        ),
        (without("config.json"), "config.json: no such file; expected a CLIPModel's folder"),
        (
            lambda f: edit_config(f, architectures=["BertModel"]),
            "architectures='BertModel': another architecture; must be",
        ),
        (
            without("model.safetensors"),
            "model.safetensors: no such file; expected weights in safetensors format",
        ),
        (
            lambda f: [without(n)(f) for n in ("tokenizer.json", "merges.txt")],
            "merges.txt: no such file; expected tokenizer.json, or vocab.json and merges.txt",
        ),
        (
            lambda f: replaced(
                f, "processor_config.json", image_processor={"size": {"longest_edge": 3}}
            ),
            "processor_config.json: size={'longest_edge': 3}: must be a whole number, or have "
            "shortest_edge, or height",
        ),
        (
            lambda f: replaced(
                f,
                "processor_config.json",
                image_processor={"image_processor_type": "ViTImageProcessor"},
            ),
            "image_processor_type='ViTImageProcessor': another model's",
        ),
        (
            lambda f: edit_config(
                f,
                text_config=json.loads((f / "config.json").read_text())["text_config"]
                | {"eos_token_id": 3},
            ),
            "ends with 55; the model has 56 and eos_token_id=3",
        ),
    ],
    ids=[
        "absent",
        "no config",
        "architecture",
        "weights",
        "tokenizer",
        "size",
        "processor",
        "end token",
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(
    torch_clip, folder, tmp_path, change, message
):
    copy = shutil.copytree(folder, tmp_path / "clip")
    change(copy)
    with pytest.raises(ValueError, match=message) as error:
        load_clip(copy)
    assert "\n" not in str(error.value)


def test_half_a_clip_is_another_architecture(tmp_path):
    config = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=4,
        projection_dim=4,
    )
    randomised(transformers.CLIPVisionModelWithProjection(config)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="architectures='CLIPVisionModelWithProjection': another architecture"
    ):
        load_clip(tmp_path)


def test_pictures_that_become_another_size_are_refused_before_they_are_made(clip):
    crop = Preprocessing(size=None, crop_size=(16, 16))
    with pytest.raises(
        ValueError, match="makes pictures of 32 pixels 16 x 16; the model reads 20 x 20"
    ):
        dataclasses.replace(clip, preprocessing=crop).check(32)
    clip.check(32)
