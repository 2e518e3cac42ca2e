"""Names of models, against a hub on loopback: what is downloaded, kept, refused, uploaded."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import pytest
from conftest import one_line
from huggingface_hub import constants
from loopback_hub import below, point_to, serving

from contextdiff_jax.runtime import hub as names
from contextdiff_jax.runtime.hub import find, find_model, parse_name, upload, wanted_files

WEIGHTS = np.random.default_rng(0).bytes(300_000)
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "model.fp16.safetensors": b"half",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"a card",
    "vae/config.json": b'{"vae": 1}',
    "vae/diffusion_pytorch_model.safetensors": b"vae",
}


@pytest.fixture(scope="module")
def server():
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The hub with a repository of two revisions, an empty cache, and an empty folder to be in."""
    server.repos.clear()
    server.add("org/name", FILES)
    server.add("org/name", FILES | {"config.json": b'{"v": 1}'}, "v1")
    point_to(monkeypatch, server.address, tmp_path / "cache")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    server.requests.clear()
    server.ranges.clear()
    return server


def test_a_name_is_downloaded_once_without_pickles_and_second_kinds_of_the_same(hub):
    folder = find("org/name")
    assert below(folder) == {*FILES} - {"model.fp16.safetensors", "pytorch_model.bin"}
    assert pathlib.Path(folder, "model.safetensors").read_bytes() == WEIGHTS
    hub.requests.clear()
    assert find("org/name") == find("hf://org/name") == folder
    assert {path for _, path in hub.requests} == {"/api/models/org/name/revision/main"}


def test_a_revision_and_a_part_are_asked_for_by_name(hub):
    assert pathlib.Path(find("org/name@v1"), "config.json").read_bytes() == b'{"v": 1}'
    part = find("org/name/vae")
    assert below(part) == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert not (pathlib.Path(part).parent / "model.safetensors").exists()


def test_a_folder_of_that_name_wins_and_nothing_is_asked_for(hub):
    os.makedirs("org/name")
    assert find("org/name") == "org/name"
    assert find("org/other") == "org/other"  # of a folder that is here: a mistyped path
    assert find("runs/name") == "runs/name"
    assert find("gs://org/name") == "gs://org/name"
    pathlib.Path("v.safetensors").touch()  # a single-file checkpoint, whose parts are paths
    assert find("v.safetensors/unet") == "v.safetensors/unet"
    assert not hub.requests
    assert find("hf://org/name") != "org/name"


def test_a_download_that_is_cut_off_goes_on_where_it_stopped(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.cut["model.safetensors"] = 200_000
    assert pathlib.Path(find("org/name"), "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges == ["bytes=200000-"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("org/none", "org/none: no such folder here, and on the hub there is no such repository"),
        ("org/name@v9", "org/name@v9: org/name has no revision 'v9'"),
        ("org/name/unet", "org/name/unet: org/name has no unet"),
        ("hf://name", "hf://name: no name of the hub's; must be hf://ORG/NAME"),
    ],
)
def test_what_the_hub_lacks_is_refused_in_one_line(hub, name, message):
    with pytest.raises(ValueError, match=message) as error:
        find(name)
    one_line(error)


def test_without_a_network_what_was_downloaded_serves_and_the_rest_names_its_command(
    hub, monkeypatch, tmp_path
):
    folder = find("org/name")
    part = find("org/name@v1/vae")
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")  # the port that discards
    assert find("org/name") == folder and find("org/name@v1/vae") == part
    for name, state, command in (
        ("org/other@v2", "is no folder here and was not downloaded", "org/other --revision v2"),
        ("org/name@v1", "was downloaded in part", "org/name --revision v1"),
    ):
        with pytest.raises(ValueError) as error:
            find(name)
        said = f"{name}: {state}, and the hub can't be reached; where it can, run: hf download "
        assert one_line(error) == said + command


@pytest.mark.parametrize(
    "files, part, wanted",
    [
        (
            [
                "model_index.json",
                "v1-5.safetensors",
                "unet/a.safetensors",
                "unet/a.fp16.safetensors",
            ],
            "",
            ["model_index.json", "unet/a.safetensors"],
        ),
        (
            ["v.safetensors", "tokenizer/vocab.json", "unet/a.safetensors"],
            "v.safetensors",
            ["tokenizer/vocab.json", "v.safetensors"],
        ),
        (["a.fp16.safetensors", "a.ckpt"], "", ["a.fp16.safetensors"]),
        (
            [
                "m-00001-of-00002.safetensors",
                "m-00002-of-00002.safetensors",
                "m.fp16-00001-of-00002.safetensors",
                "m.fp16.safetensors",
            ],
            "",
            ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"],
        ),
    ],
    ids=["pipeline", "single_file", "half_alone", "shards"],
)
def test_the_files_that_are_read_are_those_that_are_downloaded(files, part, wanted):
    assert wanted_files(files, part) == wanted


def test_a_name_is_told_from_a_path():
    assert parse_name("org/na.me-2@refs.1/a/b") == ("org/na.me-2", "refs.1", "a/b", "model")
    assert str(parse_name("org/name@v1/vae")) == "org/name@v1/vae"
    paths = ("name", "/org/name", "./org/name", "~/name", "org/name@", "../org/name", "a b/c")
    for path in (*paths, "org/name/../secret"):
        assert parse_name(path) is None, path


def test_shipped_models_are_found_by_their_names_unless_a_model_of_that_name_is_here(
    tmp_path, monkeypatch
):
    shipped = tmp_path / "shipped"
    (shipped / "tiny").mkdir(parents=True)
    (shipped / "tiny" / "config.json").write_text("{}")
    monkeypatch.setattr(names, "SHIPPED", shipped)
    monkeypatch.chdir(tmp_path)
    assert find_model("tiny") == str(shipped / "tiny")
    (tmp_path / "tiny").mkdir()  # pictures, say
    assert find_model("tiny") == str(shipped / "tiny")
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert find_model("tiny") == "tiny"
    with pytest.raises(ValueError, match="tinny: .* no such folder; .* package: tiny") as error:
        find_model("tinny")
    one_line(error)


def test_an_upload_makes_the_repository_and_needs_a_token(hub, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="me/new: the hub doesn't take it .*`hf auth login`"):
        upload(tmp_path / "model", "me/new", "first", token=False)
    address = upload(tmp_path / "model", "me/new", "first", token="hf_loopback")
    assert address.startswith(f"{hub.address}/me/new/commit/")
    assert hub.repos["models", "me/new"]["main"] == {"config.json": b"{}"}
    upload(tmp_path / "model", "me/new@trial", "second", token="hf_loopback")
    assert set(hub.repos["models", "me/new"]) == {"main", "trial"}
    with pytest.raises(ValueError, match="me/new/part: must be ORG/NAME or ORG/NAME@BRANCH"):
        upload(tmp_path / "model", "me/new/part", "third")
