"""CLIP's embeddings of pictures and captions (Radford et al. 2021), from a folder of transformers'
CLIPModel.

It reads config.json and model.safetensors, the tokenizer's files, and how pictures are prepared:
preprocessor_config.json, which transformers 5 writes into processor_config.json; without either,
CLIP's own way at the model's size.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from contextdiff_jax.data.folder_tokenizer import cut_text, num_ids, read_folder, warn_of_cut
from contextdiff_jax.evaluation.features import FeatureFn, Rows, extract, make_feature_fn
from contextdiff_jax.models.clip import PIXEL_MEAN, PIXEL_STD
from contextdiff_jax.pretrained import load_clip_text, load_clip_vision
from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.runtime.hub import find


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """transformers' CLIPImageProcessor: uint8 pictures to what the vision encoder reads.

    Attributes:
      size: a whole number, to which the shorter side is resized, or (height, width); None: no
          resizing.
      resample: PIL's number of the filter, 3 is bicubic. PIL's filters antialias when they make a
          picture smaller.
      crop_size: (height, width) of the middle that is kept, with 0 around a smaller picture; None:
          all.
      rescale_factor, image_mean, image_std: (uint8 x rescale_factor - mean) / std.
    """

    size: int | tuple[int, int] | None
    crop_size: tuple[int, int] | None
    resample: int = int(Image.Resampling.BICUBIC)
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = PIXEL_MEAN
    image_std: tuple[float, ...] = PIXEL_STD

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], default_size: int) -> Preprocessing:
        """The preprocessing of a preprocessor_config.json's values, of any age.

        ValueError for what is not CLIP's.

        Args:
          default_size: of what the file leaves out.
        """
        kind = (
            values.get("image_processor_type")
            or values.get("feature_extractor_type")
            or "CLIPImageProcessor"
        )
        if not kind.startswith(("CLIPImageProcessor", "CLIPFeatureExtractor")):
            raise ValueError(
                f"image_processor_type={kind!r}: another model's; must be CLIPImageProcessor"
            )
        given = {
            name: values.get(f"do_{name}", True)
            for name in ("resize", "center_crop", "rescale", "normalize")
        }
        return cls(
            size=_size("size", values.get("size", default_size), False)
            if given["resize"]
            else None,
            crop_size=_size("crop_size", values.get("crop_size", default_size), True)
            if given["center_crop"]
            else None,
            resample=int(Image.Resampling(values.get("resample", Image.Resampling.BICUBIC))),
            rescale_factor=values.get("rescale_factor", 1 / 255) if given["rescale"] else 1.0,
            image_mean=tuple(values.get("image_mean", PIXEL_MEAN))
            if given["normalize"]
            else (0.0,) * 3,
            image_std=tuple(values.get("image_std", PIXEL_STD))
            if given["normalize"]
            else (1.0,) * 3,
        )

    def __call__(self, images: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, "N h w 3"]:
        """The pictures as the encoder reads them."""
        if self.size is not None:
            height, width = _resized(images.shape[1:3], self.size)
            resized = (
                Image.fromarray(image).resize((width, height), self.resample) for image in images
            )
            images = np.stack([np.asarray(image) for image in resized])
        if self.crop_size is not None:
            images = _center_crop(images, self.crop_size)
        scaled = images.astype(np.float32) * np.float32(self.rescale_factor)
        return (scaled - np.array(self.image_mean, np.float32)) / np.array(
            self.image_std, np.float32
        )


def _size(field: str, value: Any, square: bool) -> int | tuple[int, int]:
    """{"shortest_edge": n}, {"height": h, "width": w}, or the plain number of old files: a square
    crop, or a short side.
    """
    if isinstance(value, int):
        return (value, value) if square else value
    match value:
        case {"shortest_edge": int(edge)} if len(value) == 1 and not square:
            return edge
        case {"height": int(height), "width": int(width)} if len(value) == 2:
            return height, width
    allowed = "height and width" if square else "shortest_edge, or height and width"
    raise ValueError(f"{field}={value!r}: must be a whole number, or have {allowed}")


def _resized(shape: tuple[int, int], size: int | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(size, int):
        return size
    height, width = shape
    long = int(size * max(shape) / min(shape))
    return (long, size) if width <= height else (size, long)


def _center_crop(
    images: UInt8[np.ndarray, "N H W 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "N h w 3"]:
    lack = [max(0, wanted - have) for wanted, have in zip(size, images.shape[1:3], strict=True)]
    images = np.pad(images, ((0, 0), *((-(-n // 2), n // 2) for n in lack), (0, 0)))
    top, left = ((have - wanted) // 2 for wanted, have in zip(size, images.shape[1:3], strict=True))
    return images[:, top : top + size[0], left : left + size[1]]


class _Prepared:
    """Pictures prepared when they are sliced: all at once, at the encoder's size in float32, may
    not fit the memory.
    """

    def __init__(self, images: Rows, preprocessing: Preprocessing):
        self._images, self._preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, part: slice) -> Float[np.ndarray, "N h w 3"]:
        return self._preprocessing(np.asarray(self._images[part]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """A CLIPModel with its tokenizer and preprocessing; `load_clip` makes it.

    `vision`: prepared pictures, of `image_size`, to embeddings; `tokenize`: captions to ids;
        `text`: ids to embeddings.
    """

    name: str
    image_size: int
    preprocessing: Preprocessing
    tokenize: Callable[[Sequence[str]], Int[np.ndarray, "N L"]]
    vision: FeatureFn
    text: FeatureFn

    def check(self, size: int) -> None:
        """Raises ValueError if the preprocessing doesn't make what the encoder reads of pictures of
        `size` pixels.
        """
        height, width = self.preprocessing(np.zeros((1, size, size, 3), np.uint8)).shape[1:3]
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"--clip={self.name}: its preprocessing makes pictures of {size} pixels {height} "
                f"x {width}; the model reads {self.image_size} x {self.image_size}"
            )

    def embed_images(self, images: Rows) -> Float[np.ndarray, "N P"]:
        """transformers' `image_embeds` before they are normalised, of pictures of one size."""
        return extract(self.vision, _Prepared(images, self.preprocessing), label="CLIP of pictures")

    def embed_captions(self, captions: Sequence[str]) -> Float[np.ndarray, "N P"]:
        """transformers' `text_embeds` before they are normalised; captions are cut to the encoder's
        length, with their end token.
        """
        return extract(self.text, self.tokenize(captions), label="CLIP of captions")


def load_clip(folder: str | pathlib.Path) -> Clip:
    """A CLIPModel's folder, or a name of the hub's (`runtime.hub.find`).

    Raises ValueError, one line with the file, if it is absent, of another architecture, lacks
    weights or the tokenizer, or its parts do not fit each other.
    """
    folder = pathlib.Path(find(folder))
    if not folder.is_dir():
        raise ValueError(
            f"--clip={folder}: no such folder; name one that transformers' CLIPModel was saved in"
        )
    values = read_json(folder / "config.json", "a CLIPModel's folder")
    architecture = (values.get("architectures") or [None])[0] or {"clip": "CLIPModel"}.get(
        values.get("model_type")
    )
    if architecture != "CLIPModel":
        raise ValueError(
            f"{folder / 'config.json'}: architectures={architecture!r}: another architecture; "
            "must be CLIPModel"
        )
    vision, text = load_clip_vision(folder), load_clip_text(folder)
    image_size = vision.config.image_size
    return Clip(
        name=folder.resolve().name,
        image_size=image_size,
        preprocessing=_load_preprocessing(folder, image_size),
        tokenize=_load_tokenizer(folder, text.config),
        vision=make_feature_fn(vision, lambda encoder, images: encoder(images).projected),
        text=make_feature_fn(text, lambda encoder, ids: encoder(ids).projected),
    )


def _load_preprocessing(folder: pathlib.Path, image_size: int) -> Preprocessing:
    path, values = folder / "preprocessor_config.json", {}
    if path.is_file():
        values = read_json(path, "CLIPImageProcessor's settings")
    elif (folder / "processor_config.json").is_file():
        path = folder / "processor_config.json"
        values = read_json(path, "CLIPProcessor's settings").get("image_processor") or {}
    try:
        return Preprocessing.from_dict(values, image_size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _load_tokenizer(
    folder: pathlib.Path, config
) -> Callable[[Sequence[str]], Int[np.ndarray, "N L"]]:
    tokenizer = read_folder(folder, "clip")
    # An id without a row, or an end token that is not found, would give figures that mean nothing.
    end, ids = tokenizer.eos_token_id, num_ids(tokenizer)
    if ids > config.vocab_size or config.eos_token_id not in (2, end):
        raise ValueError(
            f"{folder}: the tokenizer has {ids} ids and ends with {end}; the model has "
            f"{config.vocab_size} and eos_token_id={config.eos_token_id}"
        )
    length = min(tokenizer.model_max_length, config.max_position_embeddings)

    def tokenize(captions: Sequence[str]) -> Int[np.ndarray, "N L"]:
        captions = list(captions)
        rows = tokenizer(captions, padding="max_length", max_length=length, truncation=True)
        lost = list(map(cut_text, captions, rows.encodings))
        warn_of_cut(captions, lost, length, "caption")
        return np.array(rows.input_ids, np.int32)

    return tokenize
