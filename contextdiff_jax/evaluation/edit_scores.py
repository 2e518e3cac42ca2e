"""Scores of an edited clip: fidelity, consistency from frame to frame, agreement with the text."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import safetensors
from jaxtyping import Bool, Float, Real
from scipy import ndimage

from contextdiff_jax.evaluation.distances import clip_score, cosines
from contextdiff_jax.evaluation.networks.clip import load_clip
from contextdiff_jax.runtime.hub import find

Clip = Real[np.ndarray, "F H W 3"]  # 0..255
Inside = Bool[np.ndarray, "F H W"]


def psnr(clip: Clip, reference: Clip, where: Inside | None = None) -> float:
    """Peak signal-to-noise ratio in dB over all frames (`where` given: over its pixels); inf for
    equal ones.

    Raises ValueError if there is no pixel.
    """
    error = (clip.astype(np.float64) - reference) ** 2
    error = error if where is None else error[where]
    if not error.size:
        raise ValueError("psnr: the mask holds no pixel")
    mean = error.mean()
    if not np.isfinite(mean):
        raise ValueError("psnr: the clips hold values that are not finite")
    return float("inf") if mean == 0 else float(10 * np.log10(255**2 / mean))


def ssim_map(
    frame: Real[np.ndarray, "H W 3"], other: Real[np.ndarray, "H W 3"]
) -> Float[np.ndarray, "H W 3"]:
    """Structural similarity (Wang et al., 2004): Gaussian windows of sigma 1.5, 11 pixels wide,
    each channel.
    """
    a, b = frame.astype(np.float64), other.astype(np.float64)

    def blur(x):
        return ndimage.gaussian_filter(x, (1.5, 1.5, 0), truncate=5 / 1.5)

    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


def ssim(clip: Clip, reference: Clip, where: Inside | None = None) -> float:
    """Mean of `ssim_map` over frames, pixels (those of `where`) and channels."""
    maps = np.stack([ssim_map(a, b) for a, b in zip(clip, reference, strict=True)])  # [F, H, W, 3]
    if not np.isfinite(maps).all():
        raise ValueError("ssim: the clips hold values that are not finite")
    return float(maps.mean() if where is None else maps[where].mean())


def warping_error(clip: Clip, reference: Clip | None = None) -> float:
    """Mean squared difference, values in [0, 1], between each frame and the next one warped back
    onto it.

    The flow is that of `reference` (the source clip: then it asks whether the edit moves as the
    source does; None: of the clip itself) by OpenCV's DIS; pixels whose forward and backward flow
    disagree by more than a pixel are occluded and left out (Lai et al., 2018). Frames under 16
    pixels a side are enlarged for the flow. nan for a clip of one frame. Raises ImportError without
    OpenCV.
    """
    import cv2

    reference = clip if reference is None else reference
    scale = max(1, -(-64 // min(clip.shape[1:3])))  # DIS works on patches of 8 pixels
    flow_of = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def enlarged(frame):
        return np.repeat(np.repeat(frame, scale, axis=0), scale, axis=1)

    errors, (height, width) = [], (scale * side for side in clip.shape[1:3])
    y, x = np.mgrid[:height, :width].astype(np.float32)
    for i in range(len(clip) - 1):
        now, after = (cv2.cvtColor(enlarged(reference[j]), cv2.COLOR_RGB2GRAY) for j in (i, i + 1))
        forward, backward = flow_of.calc(now, after, None), flow_of.calc(after, now, None)
        place_x, place_y = x + forward[..., 0], y + forward[..., 1]
        back = cv2.remap(backward, place_x, place_y, cv2.INTER_LINEAR)
        inside = (place_x >= 0) & (place_x <= width - 1) & (place_y >= 0) & (place_y <= height - 1)
        visible = inside & (np.linalg.norm(forward + back, axis=-1) < scale)
        warped = cv2.remap(enlarged(clip[i + 1]), place_x, place_y, cv2.INTER_LINEAR)
        difference = (warped.astype(np.float64) - enlarged(clip[i])) / 255
        if visible.any():
            errors.append((difference[visible] ** 2).mean())
    return float(np.mean(errors)) if errors else float("nan")


def make_clip_scorer(folder: str | pathlib.Path) -> Callable[[Clip, str], dict[str, float]]:
    """`score(clip, prompt)` by a CLIP folder: `frame_consistency`, the mean cosine of neighbouring
    frames, and `text_alignment`, that of frames and text (both times 100, as usual). ValueError for
    a folder that holds no CLIP.
    """
    network = load_clip(folder)

    def score(clip: Clip, prompt: str) -> dict[str, float]:
        images = network.embed_images(clip)
        words = np.repeat(network.embed_captions([prompt]), len(images), axis=0)
        scores = {"text_alignment": float(clip_score(images, words).mean())}
        if len(images) > 1:
            scores["frame_consistency"] = float(clip_score(images[:-1], images[1:]).mean())
        return scores

    return score


def make_pick_scorer(folder: str | pathlib.Path) -> Callable[[Clip, str], dict[str, float]]:
    """`score(clip, prompt)` by PickScore's folder (Kirstain et al., 2023), a CLIPModel's:
    `pickscore`, the mean over frames of exp(logit_scale) cos(frame, text). ValueError for a folder
    that holds no CLIP, or no logit_scale.
    """
    folder = find(folder)
    network, path = load_clip(folder), pathlib.Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"edit.pickscore={folder}: no model.safetensors, in which logit_scale is")
    with safetensors.safe_open(path, "np") as file:
        if "logit_scale" not in file.keys():
            raise ValueError(f"{path}: no logit_scale, which PickScore needs")
        scale = float(np.exp(file.get_tensor("logit_scale").astype(np.float64)))
    if not np.isfinite(scale):
        raise ValueError(f"{path}: exp(logit_scale)={scale}: must be finite")

    def score(clip: Clip, prompt: str) -> dict[str, float]:
        agreement = cosines(
            network.embed_images(clip), network.embed_captions([prompt] * len(clip))
        )
        return {"pickscore": float(scale * agreement.mean())}

    return score
