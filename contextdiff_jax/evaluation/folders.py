"""Two folders of pictures against each other, whoever made them: FID, KID, CMMD.

Pictures are read once, a batch at a time: of all of them the moments are kept, of a fixed number,
drawn by the seed, the features. So memory doesn't grow with a folder, and its statistics can be
written and taken up. The processes of a job share the pictures.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import safetensors
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from tqdm import tqdm

from contextdiff_jax.data.decoding import UNDECODABLE, open_picture, shown
from contextdiff_jax.evaluation import distances
from contextdiff_jax.evaluation.features import FeatureFn, Moments, batch_sharding, make_feature_fn
from contextdiff_jax.evaluation.intervals import Estimate
from contextdiff_jax.evaluation.networks.clip import load_clip
from contextdiff_jax.evaluation.networks.inception import SIZE, load_inception
from contextdiff_jax.evaluation.shares import gather, share
from contextdiff_jax.pretrained.folder_files import save_tensors
from contextdiff_jax.runtime.errors import one_line
from contextdiff_jax.runtime.host import num_cores

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
KEPT = 10_000  # pictures whose features are kept, for distances that need pairs
_BATCH = 64
Picture = UInt8[np.ndarray, "H W 3"]
Prepare = Callable[[Picture], Float[np.ndarray, "*N"]]


def _positions(size: int, half_pixel: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower, upper, weight of the upper) of each of `SIZE` places along a side of `size`."""
    places = np.arange(SIZE, dtype=np.float32)
    places = (places + 0.5) * (size / SIZE) - 0.5 if half_pixel else places * (size / SIZE)
    lower = np.clip(np.floor(places), 0, size - 1).astype(int)
    return lower, np.minimum(lower + 1, size - 1), np.clip(places - lower, 0, 1).astype(np.float32)


def _bilinear(picture: Picture, half_pixel: bool) -> Float[np.ndarray, "299 299 3"]:
    """Without antialiasing."""
    (top, bottom, down), (left, right, across) = (
        _positions(size, half_pixel) for size in picture.shape[:2]
    )
    x, down, across = picture.astype(np.float32), down[:, None, None], across[None, :, None]
    rows = x[top] * (1 - down) + x[bottom] * down
    return rows[:, left] * (1 - across) + rows[:, right] * across


def _bicubic(picture: Picture) -> Float[np.ndarray, "299 299 3"]:
    """Each channel by PIL in float, antialiased."""
    channels = (
        Image.fromarray(picture[..., c].astype(np.float32)).resize((SIZE, SIZE), Image.BICUBIC)
        for c in range(3)
    )
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


# How a package makes what Inception reads, so that its figures are ours: the names of packages.
RESIZES: dict[str, Prepare] = {
    "pytorch-fid": lambda picture: _bilinear(picture, True) / 127.5 - 1,
    "torch-fidelity": lambda picture: (_bilinear(picture, False) - 128) / 128,
    "clean-fid": lambda picture: (_bicubic(picture) - 128) / 128,
}


@dataclasses.dataclass(frozen=True)
class Looking:
    """A network's features of pictures of any sizes. `name`: by what, and prepared how; statistics
    of another name don't compare.
    """

    name: str
    prepare: Prepare
    features: FeatureFn


def at_size(looking: Looking, size: int) -> Looking:
    """The same network's features of pictures that are made `square` first."""
    name = f"{looking.name}, of {size}x{size}"
    return Looking(name, lambda picture: looking.prepare(square(picture, size)), looking.features)


def square(picture: Picture, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """The picture's largest square, around its centre, in size x size pixels (PIL's Lanczos)."""
    if picture.shape[:2] == (size, size):
        return picture
    fitted = ImageOps.fit(Image.fromarray(picture), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(fitted)


def digest(path: pathlib.Path) -> str:
    """Tells the weights in a file, or in a folder's files, from others."""
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    total = hashlib.blake2b(digest_size=8)
    for file in files:
        with file.open("rb") as opened:
            for block in iter(functools.partial(opened.read, 2**20), b""):
                total.update(block)
    return total.hexdigest()


def by_inception(path: str, resize: str = "pytorch-fid") -> Looking:
    """Inception-v3's 2048 features. ValueError for a file that isn't its weights."""
    network = load_inception(path)
    name = f"Inception-v3 {digest(pathlib.Path(path))}, resized as {resize}"
    return Looking(name, RESIZES[resize], make_feature_fn(network, lambda net, x: net(x)))


def by_clip(folder: str) -> Looking:
    """CLIP's embeddings of pictures. ValueError for a folder that isn't a CLIPModel's."""
    network = load_clip(folder)
    name = f"CLIP {digest(pathlib.Path(folder))}"
    return Looking(name, lambda picture: network.preprocessing(picture[None])[0], network.vision)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What is known of a set of pictures: `name` of how they were looked at, moments of all
    features, and some features.
    """

    name: str
    moments: Moments
    kept: Float[np.ndarray, "K D"]

    def save(self, path: pathlib.Path) -> None:
        """Writes a safetensors file."""
        tensors = {"mean": self.moments.mean, "scatter": self.moments.scatter, "kept": self.kept}
        told = {"name": self.name, "count": self.moments.count}
        save_tensors(tensors, path, {"statistics": json.dumps(told)})

    @classmethod
    def load(cls, path: pathlib.Path) -> Statistics:
        """Reads what `save` wrote. ValueError for another file."""
        try:
            with safetensors.safe_open(path, "np") as file:
                told = json.loads((file.metadata() or {})["statistics"])
                arrays = {name: file.get_tensor(name) for name in ("mean", "scatter", "kept")}
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            reason = one_line(error)
            raise ValueError(f"{path}: no statistics of pictures ({reason})") from None
        moments = Moments(told["count"], arrays["mean"], arrays["scatter"])
        return cls(told["name"], moments, arrays["kept"])


def find_pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    """Its pictures and those of its folders, in the order of their names. ValueError for none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files = [p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file()]
    if len(files) < 2:
        raise ValueError(f"{folder}: {len(files)} pictures ({', '.join(ENDINGS)}); at least 2")
    return sorted(files)


def read_picture(file: pathlib.Path) -> Picture:
    """A file's picture. ValueError for one that can't be decoded."""
    try:
        with open_picture(file) as image:
            return np.asarray(shown(image))
    except UNDECODABLE as error:
        raise ValueError(f"{file}: {one_line(error)}") from None


def _prepared(
    files: Sequence[pathlib.Path], prepare: Prepare
) -> Iterator[list[Float[np.ndarray, "*N"]]]:
    """Batches, decoded by as many threads as there are cores, two batches ahead."""

    def read(file):
        return prepare(read_picture(file))

    starts = range(0, len(files), _BATCH)
    with concurrent.futures.ThreadPoolExecutor(num_cores()) as pool:
        ahead: list[list[concurrent.futures.Future]] = []
        for start in [*starts, None, None]:
            if start is not None:
                ahead.append([pool.submit(read, f) for f in files[start : start + _BATCH]])
            if len(ahead) > 2 or (start is None and ahead):
                yield [future.result() for future in ahead.pop(0)]


def look(folder: pathlib.Path, looking: Looking, seed: int = 0) -> Statistics:
    """The statistics of a folder's pictures.

    Raises ValueError for a folder without pictures, and for one that can't be decoded.
    """
    return look_at(find_pictures(folder), looking, seed, folder.name)


def look_at(
    files: Sequence[pathlib.Path], looking: Looking, seed: int = 0, label: str = ""
) -> Statistics:
    """The statistics of pictures; each process of a job looks at its share, all get the whole.

    Raises ValueError for a picture that can't be decoded, and for fewer pictures than processes.
    """
    if len(files) < jax.process_count():
        raise ValueError(f"{len(files)} pictures for {jax.process_count()} processes")
    chosen = np.random.default_rng(seed).permutation(len(files))[:KEPT]
    wanted, mine = np.isin(np.arange(len(files)), chosen), share(len(files))
    moments, kept = None, []
    for rows, features in _features(files[mine.start : mine.stop], looking, label):
        part = Moments.of(features)
        moments = part if moments is None else moments.merge(part)
        kept.append(features[wanted[mine.start :][rows]])
    own = {"count": np.array(moments.count), "mean": moments.mean, "scatter": moments.scatter}
    parts = gather(own | {"kept": np.concatenate(kept)})
    every = (Moments(int(part["count"]), part["mean"], part["scatter"]) for part in parts)
    whole = functools.reduce(Moments.merge, every)
    return Statistics(looking.name, whole, np.concatenate([part["kept"] for part in parts]))


def _features(
    files: Sequence[pathlib.Path], looking: Looking, label: str
) -> Iterator[tuple[slice, Float[np.ndarray, "N D"]]]:
    """Batches of features, with which of the files they are of."""
    sharding, place = batch_sharding(), 0
    size = -(-_BATCH // sharding.num_devices) * sharding.num_devices
    count = -(-len(files) // _BATCH)
    batches = _prepared(files, looking.prepare)
    for pictures in tqdm(batches, label, count, leave=False, unit="batch", disable=None):
        batch = np.stack(pictures + pictures[:1] * (size - len(pictures)))
        features = looking.features(jax.device_put(batch, sharding))
        rows = slice(place, place + len(pictures))
        yield rows, np.asarray(features, np.float32)[: len(pictures)]
        place = rows.stop


def open_statistics(path: str, looking: Looking, seed: int = 0) -> Statistics:
    """Of a folder of pictures, or of a file that `Statistics.save` wrote.

    Raises ValueError for a file that was made by another network, or resized in another way.
    """
    if not path.endswith(".safetensors"):
        return look(pathlib.Path(path), looking, seed)
    found = Statistics.load(pathlib.Path(path))
    if found.name != looking.name:
        raise ValueError(f"{path}: by {found.name}; must be by {looking.name}")
    return found


def _fid(samples: Statistics, reference: Statistics, seed: int) -> Estimate:
    return Estimate(*(distances.frechet_distance(samples.moments, reference.moments),) * 3)


def _kid(samples: Statistics, reference: Statistics, seed: int) -> Estimate:
    mean, deviation = distances.kid(samples.kept, reference.kept, seed=seed)
    return Estimate(mean, mean - deviation, mean + deviation)


def _cmmd(samples: Statistics, reference: Statistics, seed: int) -> Estimate:
    return distances.cmmd(samples.kept, reference.kept, seed=seed)


# By name: the distance, and whose features it is of.
DISTANCES = {"fid": (_fid, "features"), "kid": (_kid, "features"), "cmmd": (_cmmd, "clip")}
NOTES = {
    "fid": "Frechet distance of all pictures",
    "kid": "mean of 100 subsets of 1,000 pictures; in brackets one standard deviation about it",
    "cmmd": f"of up to {KEPT} pictures",
}


def compare(
    names: Sequence[str],
    samples: str,
    reference: str,
    lookings: dict[str, Looking],
    seed: int = 0,
    save: pathlib.Path | None = None,
) -> dict[str, Estimate]:
    """Each distance by its name. `lookings`: by `features` and `clip`, those that are needed.
    `save`: where the reference's statistics go (of one network).

    Raises ValueError for pictures or statistics that can't be read, and for `save` with distances
    of two networks.
    """
    kinds = {DISTANCES[name][1] for name in names}
    if save is not None and len(kinds) > 1:
        raise ValueError(f"--save_statistics={save}: holds one network's; not fid and cmmd at once")
    found = {}
    for kind in sorted(kinds):
        both = [open_statistics(path, lookings[kind], seed) for path in (samples, reference)]
        if save is not None:
            both[1].save(save)
        for name in (n for n in names if DISTANCES[n][1] == kind):
            found[name] = DISTANCES[name][0](*both, seed)
    return {name: found[name] for name in names}
