"""The evaluate command and its metrics on a run of the tiny model; the report's page."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, command
from evaluated_run import Page, perfect_evaluation, value, write_run
from flax import nnx
from PIL import Image
from torch_models import clip_model

from contextdiff_jax import diffusion
from contextdiff_jax.benchmarks.source_layouts import LAYOUTS, make_pictures
from contextdiff_jax.data import make_source
from contextdiff_jax.evaluation import distances, metrics, subject
from contextdiff_jax.evaluation.composition import composition, judge
from contextdiff_jax.evaluation.networks import classifier
from contextdiff_jax.evaluation.networks.clip import load_clip
from contextdiff_jax.inference.opening import of_run
from contextdiff_jax.models.denoising import make_denoise
from contextdiff_jax.runs.model import model_graph

ALL = "composition,bound,fid,kid,precision_recall,attributes,cmmd,clip_score"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run as it stands in its folder, and a classifier."""
    return write_run(tmp_path_factory.mktemp("evaluate") / "run")


@pytest.fixture(scope="module")
def evaluation(workdir):
    """Samples here are the real pictures of the captions: what a perfect model would make."""
    return perfect_evaluation(workdir)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """With these weights most pairs of these scenes and captions have a positive cosine."""
    folder = tmp_path_factory.mktemp("clip")
    clip_model(folder, seed=5)
    return folder


def test_a_perfect_model_is_exact_in_every_split_and_part(evaluation):
    result = metrics.composition(evaluation)
    for row in ("seen combinations", "held-out combinations"):
        assert {value(result, row, name) for name in result.scores[row]} == {1.0}
        assert {"exact", "exact_1", "exact_2", "shape", "colour", "size"} <= result.scores[
            row
        ].keys()
        assert {"shape_1", "shape_2", "exact red", "exact circle", "exact large"} <= result.details[
            "parts"
        ][row].keys()
        assert result.details["exact_by_sample"][row] == [True] * 24


def test_wrong_pictures_lower_each_metric(evaluation):
    row = "seen combinations"
    noise = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)

    def with_samples(generate):
        changed = dataclasses.replace(evaluation, generate=generate)
        changed.__dict__["sources"] = {row: evaluation.sources[row]}  # one split is enough
        return changed

    perfect_model = with_samples(evaluation.generate)
    noisy = with_samples(lambda captions, first: noise)
    shuffled = with_samples(
        lambda captions, first: np.roll(evaluation.generate(captions, first), 1, axis=0)
    )
    assert value(metrics.composition(shuffled), row, "exact") < 0.3
    for metric, name in ((metrics.fid, "fid"), (metrics.kid, "kid")):
        perfect, bad = metric(perfect_model), metric(noisy)
        floor = value(perfect, f"{row}, {metrics.FLOOR}", name)
        assert value(bad, row, name) > 1.5 * max(value(perfect, row, name), floor)
    # Distances are of distributions: pictures under the wrong captions are as near.
    assert value(metrics.kid(shuffled), row, "kid") == pytest.approx(
        value(perfect, row, "kid"), rel=1e-4
    )
    assert value(metrics.precision_recall(perfect_model), row, "precision") == 1
    assert value(metrics.precision_recall(noisy), row, "precision") < 0.5


def test_clip_judges_pictures_by_their_own_captions_and_beside_real_ones(evaluation, clip_folder):
    row = "seen combinations"
    clip = load_clip(clip_folder)

    def with_samples(generate):
        changed = dataclasses.replace(evaluation, generate=generate)
        changed.__dict__.update(sources={row: evaluation.sources[row]}, clip_network=clip)
        return changed

    perfect = with_samples(evaluation.generate)
    shuffled = with_samples(lambda captions, first: evaluation.samples(row)[::-1])
    grey = with_samples(lambda captions, first: evaluation.samples(row) // 4 + 96)
    images, captions = (
        clip.embed_images(evaluation.samples(row)),
        clip.embed_captions(evaluation.captions(row)),
    )
    pairs = distances.clip_score(images, captions)
    assert pairs.std() > 3

    result = metrics.clip_score(perfect)
    assert (
        value(result, row, "clip_score")
        == value(result, f"{row}, {metrics.FLOOR}", "clip_score")
        == pairs.mean()
    )
    # Paired: the captions' own spread is not in it.
    assert result.scores[row]["minus real"] == (0, 0, 0)
    worse = metrics.clip_score(shuffled)
    expected = distances.clip_score(images[::-1], captions)
    assert value(worse, row, "clip_score") == pytest.approx(expected.mean(), rel=1e-6)
    assert value(worse, row, "minus real") == pytest.approx((expected - pairs).mean(), rel=1e-6)
    # CMMD compares distributions: the order is nothing to it, another look is.
    first, second, third = (value(metrics.cmmd(e), row, "cmmd") for e in (perfect, shuffled, grey))
    assert first == pytest.approx(second, rel=1e-6) and third > 3 * first


def test_attributes_are_judged_against_the_records_of_the_captions(evaluation):
    logits = evaluation.sample_features("seen combinations", "logits")
    attributes = evaluation.network.attributes
    parts = classifier.split_by_attribute(logits, attributes)
    for attribute, z in zip(attributes, parts, strict=True):
        expected = []
        for record, row in zip(evaluation.records("seen combinations"), z, strict=True):
            wanted = {o[attribute.name] for o in record["attributes"]["objects"]}
            expected.append(
                {v for v, x in zip(attribute.values, row, strict=True) if x > 0} == wanted
            )
        assert attribute.multiple
        assert value(
            metrics.attributes(evaluation), "seen combinations", attribute.name
        ) == np.mean(expected)


def test_bound_with_all_timesteps_is_vlb_of_the_model_by_hand(evaluation):
    settings, row = evaluation.settings, "seen combinations"
    exact = dataclasses.replace(evaluation, bound_timesteps=0, num=6)
    result = metrics.bound(exact)
    images = np.stack([record["image"] for record in exact.records(row)])
    ids, mask = evaluation.tokenizer.encode(exact.captions(row), settings.data.max_length)
    schedule = settings.diffusion.make_schedule()

    def by_hand(params, x0, key):
        model = nnx.merge(model_graph(settings), params)
        captions = model.encode(ids, mask)
        target, shift = settings.diffusion.prediction_type, settings.context.shift
        denoise = make_denoise(model, schedule, captions, prediction_type=target)
        return diffusion.vlb(
            denoise, x0, lambda x, t: model.relate(x, captions, t), schedule, key, shift
        )

    key = jax.random.fold_in(jax.random.key(0), 0)
    terms = jax.jit(by_hand)(evaluation.params, images / np.float32(127.5) - 1, key)
    assert value(result, row, "total") == pytest.approx(float(terms["total"].mean()), rel=1e-4)
    assert value(result, row, "kl") == pytest.approx(float(terms["kl"].sum(0).mean()), rel=1e-4)
    np.testing.assert_allclose(result.details["kl_by_t"][row], terms["kl"][1:].mean(1), rtol=1e-3)


def test_branches_are_x0_hat_with_the_caption_without_it_and_with_its_words_reversed(evaluation):
    settings, row, t = (
        evaluation.settings,
        "held-out combinations",
        evaluation.settings.diffusion.num_timesteps - 1,
    )
    few = dataclasses.replace(evaluation, num=3)
    found = metrics.branches(few).scores[f"{row}, t = {t}"]
    model, schedule = (
        nnx.merge(model_graph(settings), evaluation.params),
        settings.diffusion.make_schedule(),
    )
    x0 = np.stack([record["image"] for record in few.records(row)]) / np.float32(127.5) - 1
    ts, noise = (
        jnp.full(3, t),
        jax.random.normal(
            jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), t), x0.shape
        ),
    )

    def texts(captions):
        ids, mask = evaluation.tokenizer.encode(captions, settings.data.max_length)
        return jax.jit(model.encode)(ids, mask)

    relate, predict = jax.jit(model.relate), jax.jit(model.predict)

    def estimate(caption, text):
        """x0_hat of `text`, where x_t is shifted by `caption`."""
        x_t = diffusion.q_sample(
            schedule, x0, relate(x0, caption, ts), ts, noise, settings.context.shift
        )
        return np.asarray(
            diffusion.predict_x0(
                schedule, predict(x_t, ts, text), x_t, ts, settings.diffusion.prediction_type
            )
        )

    captions = texts(few.captions(row))
    turned = texts([" ".join(reversed(caption.split())) for caption in few.captions(row)])
    with_caption, without = estimate(captions, captions), estimate(captions, texts([""] * 3))
    for name, difference in {
        "with": with_caption - x0,
        "without": without - x0,
        "apart": with_caption - without,
        "reversed": estimate(turned, turned) - x0,
    }.items():
        expected = np.mean([np.sqrt(np.mean(d.astype(np.float64) ** 2)) for d in difference])
        assert expected > 0 and found[name].value == pytest.approx(expected, rel=1e-4)


def test_judge_keeps_every_picture_s_answer(evaluation):
    images, captions = (
        evaluation.samples("seen combinations").copy(),
        evaluation.captions("seen combinations"),
    )
    images[3] = 0
    answers = judge(images, captions)
    assert np.flatnonzero(answers["exact"] == 0).tolist() == [3]
    for name, mean in composition(images, captions).items():
        assert mean == pytest.approx(np.nanmean(answers[name]))
    both = np.stack([answers["exact_1"], answers["exact_2"]])
    assert (np.isnan(both).sum(0) == 1).all()
    np.testing.assert_array_equal(np.nanmax(both, axis=0), answers["exact"])


@pytest.mark.parametrize(
    "name, changes, message",
    [
        (
            "composition",
            {"source": "folder"},
            "judges scenes of data.source='shapes'; the run's is 'folder'",
        ),
        (
            "fid",
            {"features": "nowhere"},
            "--features=nowhere: no such folder or file; name one that",
        ),
        (
            "attributes",
            {"features": str(ROOT / "README.md")},
            "README.md: truncated or not a safetensors file",
        ),
        ("kid", {"image_size": 32}, "reads pictures of 16 pixels, the run's have 32"),
        ("precision_recall", {"num": 3}, "--num=3, --reference=40: 3 neighbours need more"),
        (
            "cmmd",
            {},
            "--clip: missing; cmmd and clip_score need a folder that transformers' CLIPModel was "
            "saved in",
        ),
        ("clip_score", {"clip": "nowhere"}, "--clip=nowhere: no such folder"),
        ("bound", {"bound_timesteps": 50}, "--bound_timesteps=50: must lie in 1..49"),
    ],
)
def test_what_a_run_cannot_have_is_refused_before_sampling(evaluation, name, changes, message):
    data = {key: changes[key] for key in ("source", "image_size") if key in changes}
    rest = {key: v for key, v in changes.items() if key not in data}
    settings = evaluation.settings
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, **data))
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as error:
        metrics.check([name], dataclasses.replace(evaluation, settings=settings, **rest))
    assert "\n" not in str(error.value)


def test_splits_have_held_out_rows_only_where_there_are_held_out_records(evaluation, tmp_path):
    data = evaluation.settings.data
    assert list(subject.splits(data)) == ["seen combinations", "held-out combinations"]
    assert list(subject.splits(dataclasses.replace(data, heldout_fraction=0.0))) == [
        "seen combinations"
    ]
    trained_on = make_source(data, "train")
    seen = subject.splits(data)["seen combinations"]
    assert any(seen.scene(i) != trained_on.scene(i) for i in range(5))
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    for name in ("metadata.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text(json.dumps({"file_name": "a.png", "text": name}) + "\n")
    folder = dataclasses.replace(data, source="folder", path=str(tmp_path))
    assert list(subject.splits(folder)) == ["training records"]
    rows = subject.splits(dataclasses.replace(folder, heldout_metadata="heldout.jsonl"))
    captions = {row: source[0]["caption"] for row, source in rows.items()}
    assert captions == {"training records": "metadata.jsonl", "held-out records": "heldout.jsonl"}


BOTH = ["training records", "held-out records"]


@pytest.mark.parametrize(
    "source, fields, rows",
    [
        ("folder", {}, BOTH),  # its test/ is found
        ("webdataset", {}, BOTH[:1]),
        ("webdataset", {"metadata": "00000.tar", "heldout_metadata": "00001.tar"}, BOTH),
        ("tfds", {}, BOTH[:1]),
        ("tfds", {"metadata": "train[:50%]", "heldout_metadata": "train[50%:]"}, BOTH),
    ],
)
def test_runs_on_every_source_of_pictures_are_evaluated_on_the_splits_it_has(
    source, fields, rows, evaluation, tmp_path
):
    pictures = make_pictures(16, 16, 16)
    if source == "folder":
        for split, part in {"train": pictures[:8], "test": pictures[8:]}.items():
            LAYOUTS[source](tmp_path / split, part)
    else:
        LAYOUTS[source](tmp_path, pictures, **({"per_shard": 8} if source == "webdataset" else {}))
    data = dataclasses.replace(
        evaluation.settings.data, source=source, path=str(tmp_path), **fields
    )
    changed = dataclasses.replace(
        evaluation, settings=dataclasses.replace(evaluation.settings, data=data), num=8, reference=8
    )
    metrics.check(["fid", "precision_recall"], changed)
    assert list(changed.sources) == rows and len(changed.sources[rows[0]]) in (8, 16)
    perfect = {row: np.stack([r["image"] for r in changed.records(row)]) for row in rows}
    shown = iter(perfect.values())
    object.__setattr__(changed, "generate", lambda captions, first: next(shown))
    scores = metrics.precision_recall(changed).scores
    assert {row: scores[row]["precision"].value for row in rows} == dict.fromkeys(rows, 1.0)
    with pytest.raises(ValueError, match="judges scenes of data.source='shapes'"):
        metrics.check(["composition"], changed)


def test_a_share_of_the_captions_gives_the_pictures_that_all_of_them_do(evaluation):
    settings = evaluation.settings
    pipeline = of_run(settings, evaluation.tokenizer, evaluation.params)
    sample = functools.partial(pipeline.text_to_image, steps=2, batch_size=2)
    captions = ["a red circle", "a blue square", "a large red circle"]
    whole, part = sample(captions), sample(captions[1:], first=1)
    np.testing.assert_allclose(part.astype(int), whole[1:].astype(int), atol=1)  # rounded to uint8
    assert np.abs(whole[1].astype(int) - whole[2]).max() > 20


def test_the_command_writes_table_json_and_a_page_that_needs_no_network(workdir, clip_folder):
    def checkpoints_now():
        return {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}

    before = checkpoints_now()
    done = command(
        "evaluate",
        f"--workdir={workdir}",
        f"--metrics={ALL}",
        "--num=6",
        "--steps=2",
        "--reference=12",
        "--bound_timesteps=4",
        "--guidance=1.5",
        f"--clip={clip_folder}",
    )
    assert done.returncode == 0, done.stderr
    # Nothing was written where a training may be going on, and no library warned of anything; that
    # CLIP's nine tokens cut the captions is our own warning.
    assert before and checkpoints_now() == before
    warned = [line for line in done.stderr.splitlines() if "warning: " in line or line[:1] == "W"]
    assert all("cut at 9 tokens" in line for line in warned), done.stderr
    saved = json.loads((workdir / "metrics.json").read_text())
    for metric in ALL.split(","):
        assert f"{metric}, step 3" in done.stdout
        for row in ("seen combinations", "held-out combinations"):
            assert row in done.stdout
            for name, number in saved[metric][row].items():
                low, high = saved["intervals"][metric][row][name]
                assert low <= number <= high and np.isfinite([low, number, high]).all()
    assert set(saved["bound"]["seen combinations"]) == {"total", "prior", "kl", "decoder"}
    assert len(saved["details"]["bound"]["kl_by_t"]["seen combinations"]) == 4
    assert (
        saved["sample"]["guidance"] == 1.5
        and saved["step"] == 3
        and saved["machine"]["jax"] == jax.__version__
    )

    page = Page()
    page.feed((workdir / "report" / "index.html").read_text())
    assert len(page.addresses) == len(set(page.addresses)) >= 5
    for address in page.addresses:
        assert "/" not in address and (workdir / "report" / address).read_bytes().startswith(
            b"\x89PNG"
        )
    text = " ".join(page.text)
    cpu = saved["machine"]["cpu"]
    for wanted in (
        "--bound_timesteps=4",
        "held-out combinations",
        "num_timesteps",
        "training",
        cpu,
    ):
        assert wanted in text
    exact = saved["composition"]["seen combinations"]["exact"]
    assert f"{100 * exact:.1f}%" in text
