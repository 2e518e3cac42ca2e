"""Inception-v3 against a torch network written here from the checkpoint's names and the TensorFlow
graph's rules.
"""

import functools
import json

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command
from flax import nnx
from safetensors.torch import save_file

from contextdiff_jax.editing.output import save_frames
from contextdiff_jax.evaluation.networks.inception import WIDTH, load_inception, resize
from contextdiff_jax.evaluation.subject import feature_fns


class TorchInception:
    """The forward pass on a state dict; the first call of a name draws its weights (so this also
    makes the file).
    """

    def __init__(self, seed: int):
        self.tensors, self.generator = {}, torch.Generator().manual_seed(seed)

    def conv(self, x, name, features, kernel=(1, 1), stride=1, padding=(0, 0)):
        if f"{name}.conv.weight" not in self.tensors:
            draw = functools.partial(torch.rand, generator=self.generator)
            fan_in = x.shape[1] * kernel[0] * kernel[1]
            weight = torch.randn((features, x.shape[1], *kernel), generator=self.generator)
            self.tensors[f"{name}.conv.weight"] = weight * (2 / fan_in) ** 0.5
            self.tensors[f"{name}.bn.weight"] = 0.8 + 0.6 * draw(features)
            self.tensors[f"{name}.bn.bias"] = 0.4 * draw(features) - 0.1
            self.tensors[f"{name}.bn.running_mean"] = 0.2 * draw(features) - 0.1
            self.tensors[f"{name}.bn.running_var"] = 0.7 + 0.6 * draw(features)
            self.tensors[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
        t = self.tensors
        x = F.conv2d(x, t[f"{name}.conv.weight"], stride=stride, padding=padding)
        norm = (
            t[f"{name}.bn.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, *norm, training=False, eps=1e-3))

    def chain(self, x, prefix, *layers):
        for name, features, kernel, *stride in layers:
            padding = (0, 0) if stride else (kernel[0] // 2, kernel[1] // 2)
            x = self.conv(x, f"{prefix}.{name}", features, kernel, *stride, padding=padding)
        return x

    def pool(self, x, prefix, features, maximum=False):
        pooled = (
            F.max_pool2d(x, 3, 1, 1)
            if maximum
            else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        )
        return self.conv(pooled, f"{prefix}.branch_pool", features)

    def a(self, x, p, pool):
        five = self.chain(x, p, ("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5)))
        double = self.chain(
            x,
            p,
            ("branch3x3dbl_1", 64, (1, 1)),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3)),
        )
        return torch.cat(
            [self.conv(x, f"{p}.branch1x1", 64), five, double, self.pool(x, p, pool)], 1
        )

    def b(self, x, p):
        three = self.chain(x, p, ("branch3x3", 384, (3, 3), 2))
        double = self.chain(
            x,
            p,
            ("branch3x3dbl_1", 64, (1, 1)),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3), 2),
        )
        return torch.cat([three, double, F.max_pool2d(x, 3, 2)], 1)

    def c(self, x, p, w):
        wide, tall = (1, 7), (7, 1)
        seven = self.chain(
            x, p, ("branch7x7_1", w, (1, 1)), ("branch7x7_2", w, wide), ("branch7x7_3", 192, tall)
        )
        double = self.chain(
            x,
            p,
            ("branch7x7dbl_1", w, (1, 1)),
            ("branch7x7dbl_2", w, tall),
            ("branch7x7dbl_3", w, wide),
            ("branch7x7dbl_4", w, tall),
            ("branch7x7dbl_5", 192, wide),
        )
        return torch.cat(
            [self.conv(x, f"{p}.branch1x1", 192), seven, double, self.pool(x, p, 192)], 1
        )

    def d(self, x, p):
        three = self.chain(x, p, ("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3), 2))
        seven = self.chain(
            x,
            p,
            ("branch7x7x3_1", 192, (1, 1)),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, (3, 3), 2),
        )
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def e(self, x, p, maximum):
        three = self.conv(x, f"{p}.branch3x3_1", 384)
        double = self.chain(x, p, ("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3)))
        halves = [
            self.chain(y, p, (f"{name}{half}", 384, kernel))
            for y, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
            for half, kernel in (("a", (1, 3)), ("b", (3, 1)))
        ]
        return torch.cat(
            [self.conv(x, f"{p}.branch1x1", 320), *halves, self.pool(x, p, 192, maximum)], 1
        )

    @torch.no_grad()
    def __call__(self, images):
        x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        x = self.conv(x, "Conv2d_1a_3x3", 32, (3, 3), 2)
        x = self.conv(
            self.conv(x, "Conv2d_2a_3x3", 32, (3, 3)), "Conv2d_2b_3x3", 64, (3, 3), 1, (1, 1)
        )
        x = self.conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1", 80)
        x = F.max_pool2d(self.conv(x, "Conv2d_4a_3x3", 192, (3, 3)), 3, 2)
        for name, pool in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = self.a(x, f"Mixed_{name}", pool)
        x = self.b(x, "Mixed_6a")
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = self.c(x, f"Mixed_{name}", width)
        x = self.d(x, "Mixed_7a")
        x = self.e(self.e(x, "Mixed_7b", False), "Mixed_7c", True)
        return x.mean((2, 3)).numpy()


def pictures(size):
    """Noise and a gradient: neither constant nor symmetric."""
    rng = np.random.default_rng(size)
    noise = rng.integers(0, 256, (1, size, size, 3))
    ramps = np.meshgrid(np.linspace(0, 255, size), np.linspace(30, 200, size))
    ramp = np.stack([*ramps, np.full((size, size), 77)], -1)
    return np.concatenate([noise, ramp[None]]).astype(np.uint8)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(the torch network, its features of small pictures, its weights' file in the checkpoint's
    naming).
    """
    network = TorchInception(seed=0)
    features = network(pictures(40))
    tensors = network.tensors | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(tensors, path)
    return network, features, path


def test_features_equal_the_torch_network_s(reference):
    _, expected, path = reference
    features = np.asarray(feature_fns(load_inception(path))["features"](pictures(40)))
    assert features.shape == (2, WIDTH) and expected.std() > 0.1
    assert np.linalg.norm(features - expected) < 1e-4 * np.linalg.norm(expected)
    # The pictures differ by far more than that, so the comparison is of something.
    assert np.linalg.norm(expected[0] - expected[1]) > 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("size", [16, 64, 299, 331])
def test_resize_is_torch_s_bilinear_without_antialiasing(size):
    images = pictures(size)
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False).permute(
        0, 2, 3, 1
    )
    np.testing.assert_allclose(np.asarray(jax.jit(resize)(images)), expected.numpy(), atol=2e-5)


def test_the_network_has_as_many_weights_as_the_published_one(reference):
    network = load_inception(reference[2])
    weights = sum(
        p.size
        for path, p in nnx.to_flat_state(nnx.state(network, nnx.Param))
        if path[-1] == "kernel"
    )
    # Of the 94 convolutions, without classifier and batch normalisation.
    assert weights == 21_751_136


def write(tmp_path, reference, change):
    tensors = {name: value.clone() for name, value in reference[0].tensors.items()}
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def test_another_network_s_file_is_refused_by_the_tensor_s_name(tmp_path, reference):
    path = write(tmp_path, reference, lambda t: t.pop("Mixed_6b.branch7x7_2.bn.running_var"))
    with pytest.raises(
        ValueError, match="1 tensors do not fit: Mixed_6b.branch7x7_2.bn.running_var: missing"
    ):
        load_inception(path)
    path = write(
        tmp_path,
        reference,
        lambda t: t.update({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)}),
    )
    with pytest.raises(
        ValueError, match=r"Conv2d_1a_3x3.conv.weight: \(32, 1, 3, 3\), wanted \(32, 3, 3, 3\)"
    ):
        load_inception(path)
    path = write(tmp_path, reference, lambda t: t.update({"Mixed_8a.conv.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match="unknown tensors.*Mixed_8a.conv.weight"):
        load_inception(path)


def test_a_pickle_and_a_damaged_file_are_refused_in_one_line(tmp_path, reference):
    for name, legacy in (("new.pth", False), ("old.pth", True)):
        torch.save(
            {"a": torch.zeros(1)}, tmp_path / name, _use_new_zipfile_serialization=not legacy
        )
        with pytest.raises(ValueError, match="a torch pickle, which can run code") as error:
            load_inception(tmp_path / name)
        assert "\n" not in str(error.value) and "save_file" in str(error.value)
    whole = reference[2].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for path in (tmp_path / "cut.safetensors", tmp_path / "gone.safetensors"):
        with pytest.raises(ValueError, match=path.name):
            load_inception(path)


@pytest.mark.slow  # half a minute of compilation: pytest -m slow tests/test_inception.py
def test_the_command_compares_two_folders_as_torch_and_numpy_do(reference, tmp_path):
    network, _, path = reference
    sets = {name: pictures(size) for name, size in (("samples", 40), ("real", 44))}
    for name, images in sets.items():
        save_frames(images, tmp_path / name)
    x, y = (np.asarray(network(images), np.float64) for images in sets.values())
    options = ["--metrics=fid", f"--features={path}", f"--out={tmp_path / 'out'}"]
    options += [f"--save_statistics={tmp_path / 'real.safetensors'}"]
    folders = [f"--samples={tmp_path / 'samples'}", f"--reference={tmp_path / 'real'}"]
    done = command("evaluate", *folders, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "distances.json").read_text())
    mean = np.sum((x.mean(0) - y.mean(0)) ** 2)
    # Of two pictures each the covariances have rank 1: their trace term is in closed form.
    d, e = ((a[0] - a[1]) / 2**0.5 for a in (x, y))
    wanted = mean + d @ d + e @ e - 2 * abs(d @ e)
    assert found["fid"]["value"] == pytest.approx(wanted, rel=1e-3)
    folders[1] = f"--reference={tmp_path / 'real.safetensors'}"
    again = command("evaluate", *folders, *options[:2])
    assert again.stdout.split()[1] == done.stdout.split()[1]
    lacking = command("evaluate", *folders, "--metrics=fid")
    assert lacking.returncode == 2 and "--features: missing" in lacking.stderr
