"""Tokenizers of folders as transformers' versions and people's editors left them."""

from __future__ import annotations

import json
import logging
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from torch_models import clip_tokenizer, edit_config, t5_encoder

from contextdiff_jax.data import load_tokenizer, make_loader
from contextdiff_jax.data.folder_tokenizer import max_length, read_folder
from contextdiff_jax.data.shapes import ShapesConfig, ShapesSource
from contextdiff_jax.runs.tokenizer import open_tokenizer
from contextdiff_jax.runtime.keys import make_key

TEXTS = ["a red circle", "RED  reds", "", "é☕ red", "(red:1.3) circle"]
MARK = b"\xef\xbb\xbf"  # the byte order mark
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 3\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of `fast` and `slow` files of CLIP's tokenizer, and of a T5 and its tokenizer; the ids
    of TEXTS by transformers.
    """
    root = tmp_path_factory.mktemp("tokens")
    clip = clip_tokenizer(root / "slow")
    clip.save_pretrained(root / "fast")
    shutil.copy(root / "fast" / "tokenizer_config.json", root / "slow")
    _, t5 = t5_encoder(root / "t5")
    options = dict(padding="max_length", max_length=9, truncation=True)
    ids = {"fast": clip(TEXTS, **options).input_ids, "t5": t5(TEXTS, **options).input_ids}
    return root, ids | {"slow": ids["fast"]}


def changed(name, **values):
    """A change of a JSON file's fields; None stays null."""

    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def written(name, content):
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def prefixed(name):
    return lambda folder: (folder / name).write_bytes(MARK + (folder / name).read_bytes())


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def drop_all_but_the_vocabulary(folder):
    for path in folder.iterdir():
        if path.name not in ("tokenizer.json", "vocab.json", "merges.txt"):
            path.unlink()


def windows_lines(folder):
    path = folder / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


CONFIG = "tokenizer_config.json"
READ = {
    "as it is": lambda folder: None,
    "vocabulary alone": drop_all_but_the_vocabulary,
    "PreTrainedTokenizerFast": changed(CONFIG, tokenizer_class="PreTrainedTokenizerFast"),
    "TokenizersBackend": changed(CONFIG, tokenizer_class="TokenizersBackend"),
    "null class": changed(CONFIG, tokenizer_class=None),
    "marked config": prefixed(CONFIG),
}


@pytest.mark.parametrize("change", READ)
@pytest.mark.parametrize("kind", ["fast", "slow", "t5"])
def test_ids_are_those_of_transformers_whatever_the_config_says(folders, tmp_path, kind, change):
    root, ids = folders
    folder = shutil.copytree(root / kind, tmp_path / "tokenizer")
    READ[change](folder)
    tokenizer = load_tokenizer(folder)
    np.testing.assert_array_equal(tokenizer.encode(TEXTS, 9)[0], ids[kind])
    assert tokenizer.vocab_size == {"t5": 28}.get(kind, 56)  # no token is added that no encoder has


@pytest.mark.parametrize(
    "kind, change",
    [
        ("fast", prefixed("tokenizer.json")),
        ("slow", prefixed("vocab.json")),
        ("slow", prefixed("merges.txt")),
        ("slow", windows_lines),
        ("slow", written("special_tokens_map.json", '{"pad_token": "<|endoftext|>"}')),
        ("slow", written("added_tokens.json", '{"<sks>": 56}')),
    ],
)
def test_files_that_editors_and_old_versions_wrote_give_the_same_ids(
    folders, tmp_path, kind, change
):
    root, ids = folders
    folder = shutil.copytree(root / kind, tmp_path / "tokenizer")
    change(folder)
    np.testing.assert_array_equal(load_tokenizer(folder).encode(TEXTS, 9)[0], ids[kind])


REFUSED = {
    "no vocabulary": ("fast", without("tokenizer.json"), "holds no tokenizer's vocabulary"),
    "no merges": ("slow", without("merges.txt"), "merges.txt: no such file"),
    "no vocab": ("slow", without("vocab.json"), "vocab.json: no such file"),
    "cut JSON": ("fast", written("tokenizer.json", "{"), "tokenizer.json: not valid JSON"),
    "no model": ("fast", written("tokenizer.json", "{}"), "tokenizer.json: holds no vocabulary"),
    "pointer": ("slow", written("merges.txt", POINTER), "merges.txt: is a Git LFS pointer"),
    "empty": ("slow", written("merges.txt", ""), "merges.txt: is empty"),
    "cut merges": ("slow", written("merges.txt", "r e\nre"), "merges.txt: doesn't fit vocab.json"),
    "a list": ("slow", written("vocab.json", "[1]"), "vocab.json: not a JSON object"),
    "GPT-2": ("slow", written("vocab.json", '{"a": 0}'), "vocab.json: another model's"),
    "config": ("fast", written(CONFIG, "{"), "tokenizer_config.json: not valid JSON"),
    "added": ("slow", written("added_tokens.json", "{"), "added_tokens.json: not valid JSON"),
    "class": ("t5", changed(CONFIG, tokenizer_class="CLIPTokenizer"), "the vocabulary is T5's"),
    "WordPiece": (
        "fast",
        changed("tokenizer.json", model={"type": "WordPiece", "vocab": {"a": 0}}),
        "model.type='WordPiece': another model's",
    ),
    "no padding": ("fast", changed(CONFIG, pad_token=None), "pad_token=None"),
    "sentencepiece": (
        "t5",
        lambda folder: (folder / "tokenizer.json").rename(folder / "spiece.model"),
        "spiece.model: can't be read without a package; pip install sentencepiece",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_is_not_there_is_refused_in_one_line(folders, tmp_path, name):
    kind, change, message = REFUSED[name]
    folder = shutil.copytree(folders[0] / kind, tmp_path / "tokenizer")
    change(folder)
    with pytest.raises(ValueError) as error:
        load_tokenizer(folder)
    text = str(error.value)
    assert message in text and text.startswith(f"tokenizer={folder}") and "\n" not in text


def test_the_kind_that_the_text_encoder_reads_is_asked_for(folders):
    root, _ = folders
    with pytest.raises(ValueError, match="the tokenizer is T5's; the text encoder reads CLIP's"):
        read_folder(root / "t5", "clip")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        read_folder(root / "nowhere", "clip")


def test_the_length_is_read_with_and_without_a_config(folders, tmp_path):
    root, _ = folders
    assert max_length(root / "fast", 77) == 9 and max_length(root / "fast", 5) == 5
    assert max_length(tmp_path, 77) == 77
    (tmp_path / CONFIG).write_text('{"model_max_length": null}')
    assert max_length(tmp_path, 77) == 77
    for wrong in ('"77"', "1", "-5"):
        (tmp_path / CONFIG).write_text(f'{{"model_max_length": {wrong}}}')
        with pytest.raises(ValueError, match="model_max_length=.* must be a number of at least 2"):
            max_length(tmp_path, 77)


def settings(tokenizer, encoder="", vocab_size=4096):
    data, text = (
        SimpleNamespace(tokenizer=str(tokenizer)),
        SimpleNamespace(pretrained=str(encoder), vocab_size=vocab_size),
    )
    return SimpleNamespace(data=data, text=text)


def test_a_runs_tokenizer_fits_its_text_encoder(folders, tmp_path):
    root, _ = folders
    t5 = shutil.copytree(root / "t5", tmp_path / "t5")
    clip = tmp_path / "clip"
    clip.mkdir()
    values = {"model_type": "clip_text_model", "vocab_size": 56, "hidden_size": 8}
    (clip / "config.json").write_text(json.dumps(values | {"num_attention_heads": 1}))
    assert open_tokenizer(settings(root / "fast", clip)).vocab_size == 56
    assert open_tokenizer(settings(root / "t5", t5)).kind == "t5"
    assert open_tokenizer(settings("")).vocab_size == 4096
    for wrong, message in (
        (settings(root / "t5", clip), "must be the folder of CLIP's tokenizer"),
        (settings(root / "fast", t5), "must be the folder of T5's tokenizer"),
        (settings("", clip), "must be the folder of CLIP's tokenizer"),
        (settings("", vocab_size=4095), "text.vocab_size=4095: the tokenizer has 4096 ids"),
    ):
        with pytest.raises(ValueError, match=message):
            open_tokenizer(wrong)
    for encoder, tokenizer in ((clip, "fast"), (t5, "t5")):
        edit_config(encoder, vocab_size=27)
        with pytest.raises(ValueError, match=r"its ids reach \d+; .* has rows for 0..26"):
            open_tokenizer(settings(root / tokenizer, encoder))


def test_the_words_that_are_cut_off_are_told_whole(folders):
    root, _ = folders
    text = "a red circle, red red"
    for kind, length, lost in (("slow", 8, "circle, red red"), ("t5", 3, "circle, red red")):
        tokenizer = load_tokenizer(root / kind)
        assert tokenizer.encode_and_cut([text, "a red"], length)[2] == [lost, ""]
    ours = load_tokenizer()
    assert ours.encode_and_cut(["a  small red circle", "a red circle"], 5)[2] == ["circle", ""]


def test_a_loader_counts_captions_that_are_cut_and_names_the_first(caplog):
    source = ShapesSource(ShapesConfig(image_size=16, length=20))
    loader = make_loader(source, batch_size=4, tokenizer=load_tokenizer(), max_length=4)
    with caplog.at_level(logging.WARNING):
        captions = [caption for _ in range(3) for caption in next(loader)["caption"]]
    loader.close()
    assert loader.num_cut == sum(len(caption.split()) > 2 for caption in captions) > 1
    (record,) = [r for r in caplog.records if "is cut at 4 tokens" in r.getMessage()]
    assert next(c for c in captions if len(c.split()) > 2).split()[-1] in record.getMessage()


def test_every_seed_of_64_bits_has_a_key_of_its_own():
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1]
    keys = [tuple(jax.random.key_data(make_key(seed)).tolist()) for seed in seeds]
    assert len(set(keys)) == len(seeds)
    assert keys[1] == tuple(jax.random.key_data(jax.random.key(1)).tolist())
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"--seed={seed}: must lie in 0..{2**64 - 1}"):
            make_key(seed, "--seed")
