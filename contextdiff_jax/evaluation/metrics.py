"""The evaluate command's metrics by name: functions of an `Evaluation` (see `subject`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array

from contextdiff_jax.data.folder_tokenizer import warn_of_cut
from contextdiff_jax.diffusion.process import MOTIONS
from contextdiff_jax.evaluation import bound as bounds
from contextdiff_jax.evaluation import distances
from contextdiff_jax.evaluation import upsampling as upsamplers
from contextdiff_jax.evaluation.branches import in_reverse, model_branches
from contextdiff_jax.evaluation.composition import is_main, judge
from contextdiff_jax.evaluation.features import batches, check_finite
from contextdiff_jax.evaluation.intervals import Estimate, mean_interval
from contextdiff_jax.evaluation.likelihood import check_flow, flow_times, model_bits
from contextdiff_jax.evaluation.networks.classifier import Classifier, correct, read_labels
from contextdiff_jax.evaluation.networks.inception import Inception
from contextdiff_jax.evaluation.result import Result, Scores
from contextdiff_jax.evaluation.shares import gather_rows, join
from contextdiff_jax.evaluation.subject import Evaluation
from contextdiff_jax.models.denoising import empty_like
from contextdiff_jax.models.pixels import to_unit
from contextdiff_jax.runtime.keys import make_key

FLOOR = "real pictures instead"
_BOUND_BATCH = 32
_BRANCHES = 8  # timesteps
_FLOW_STEPS = 50
_NEIGHBOURS = 3  # of precision and recall, the paper's


def check(names: Sequence[str], evaluation: Evaluation) -> None:
    """Raises ValueError for a metric that this run can't have, before anything is sampled."""
    settings = evaluation.settings
    upsamplers.check(names, evaluation)
    for name in names:
        if name == "composition" and not settings.data.kind.has_scenes:
            raise ValueError(
                "--metrics=composition: judges scenes of data.source='shapes'; the run's is "
                f"{settings.data.source!r}"
            )
        if name in ("bound", "branches", "likelihood") and settings.latent.vae:
            raise ValueError(
                f"--metrics={name}: is of pixels; this run's x0 are latents (latent.vae)"
            )
        process = settings.process
        if name in ("bound", "branches") and (
            process.schedule.continuous or process.prediction_type in MOTIONS
        ):
            raise ValueError(
                f"--metrics={name}: is of x0's estimates on a discrete schedule; this run's "
                f"diffusion.schedule={settings.diffusion.schedule!r}, prediction_type="
                f"{process.prediction_type!r}"
            )
        if name == "likelihood":
            check_flow(settings)
        if name == "bound":
            bounds.make_strata(settings.diffusion.num_timesteps, evaluation.bound_timesteps or None)
        if name == "precision_recall" and min(evaluation.num, evaluation.reference) <= _NEIGHBOURS:
            raise ValueError(
                f"--num={evaluation.num}, --reference={evaluation.reference}: {_NEIGHBOURS} "
                "neighbours need more"
            )
        if name in ("cmmd", "clip_score"):
            evaluation.clip_network.check(settings.data.image_size)
        if name in ("fid", "kid", "precision_recall", "attributes", "upsampling_features"):
            network = evaluation.network
            if name == "attributes" and not isinstance(network, Classifier):
                raise ValueError(
                    f"--features={evaluation.features}: --metrics=attributes needs a classifier's "
                    "folder"
                )
    processes = jax.process_count()
    for row, source in evaluation.sources.items():
        fewest = min(evaluation.num, evaluation.reference, len(source))
        if fewest < processes:
            raise ValueError(
                f"--num, --reference: {fewest} pictures of {row} for {processes} processes; each "
                "needs one"
            )


def composition(evaluation: Evaluation) -> Result:
    """A comparison of what the scenes' pixels show with what their captions say."""
    rows = evaluation.sources
    judged = {
        row: gather_rows(judge(evaluation.samples(row), evaluation.captions(row))) for row in rows
    }
    estimates = {
        row: {name: mean_interval(v) for name, v in values.items()}
        for row, values in judged.items()
    }
    scores = {
        row: {n: e for n, e in names.items() if is_main(n)} for row, names in estimates.items()
    }
    parts = {
        row: {n: e for n, e in names.items() if not is_main(n)} for row, names in estimates.items()
    }
    marks = {row: [bool(v) for v in values["exact"]] for row, values in judged.items()}
    note = (
        "share of captions; exact: every object, its shape, colour, size and place, and nothing "
        "else"
    )
    return Result(scores, "%", note, {"parts": parts, "exact_by_sample": marks})


PictureFn = Callable[..., dict[str, Array]]


def _compiled(evaluation: Evaluation, function: PictureFn) -> PictureFn:
    """`function(model, x0, captions, empty, key, steps)` of the evaluation's model, jitted as a
    function of `(params, images, ids, mask, null ids, null mask, key, steps)`; images are uint8.
    """

    @jax.jit
    def compiled(params, images, ids, mask, null_ids, null_mask, key, steps):
        model = nnx.merge(evaluation.graph, params)
        captions = model.encode(ids, mask)
        empty = empty_like(captions, model.encode_empty(null_ids, null_mask))
        return function(model, to_unit(images), captions, empty, key, steps)

    return compiled


def _on_pictures(
    evaluation: Evaluation,
    row: str,
    function: PictureFn,
    steps: np.ndarray,
    name: str,
    words: Callable[[str], str] = str,
) -> dict[str, np.ndarray]:
    """Values, a column a picture, of a `_compiled` function for real pictures and what `words`
    makes of their captions.
    """
    tokenizer, length = evaluation.tokenizer, evaluation.settings.data.max_length
    null = tokenizer.encode([""], length)
    captions = [words(caption) for caption in evaluation.captions(row)]
    ids, mask, lost = tokenizer.encode_and_cut(captions, length)
    warn_of_cut(captions, lost, length, "caption")
    images = evaluation.pictures(row)
    key, parts, number = make_key(evaluation.seed), [], evaluation.numbers(row).start
    for batch, real in batches((images, ids, mask), _BOUND_BATCH, name):
        # By the first record's number: no two batches, of any process, have the same noise.
        values = function(evaluation.params, *batch, *null, jax.random.fold_in(key, number), steps)
        parts.append({name: np.asarray(value)[..., :real].T for name, value in values.items()})
        number += real
    found = gather_rows(join(parts))
    check_finite(**{f"{name}, {what}": rows for what, rows in found.items()})
    return {what: rows.T for what, rows in found.items()}


def bound(evaluation: Evaluation) -> Result:
    """The bound on -log2 p(picture | caption) of `num` real pictures a split."""
    process = evaluation.settings.process
    num_timesteps = process.schedule.num_timesteps

    def function(model, x0, captions, _, key, edges):
        return bounds.model_bound(model, process, x0, captions, key, edges)

    terms = _compiled(evaluation, function)
    edges = bounds.make_strata(num_timesteps, evaluation.bound_timesteps or None)
    scores, details = {}, {"edges": edges.tolist(), "kl_by_t": {}, "standard_error": {}}
    for row in evaluation.sources:
        result = bounds.collect([_on_pictures(evaluation, row, terms, edges, "bound")], edges)
        named = {
            "total": result.total,
            "prior": result.prior,
            "kl": result.kl,
            "decoder": result.decoder,
        }
        scores[row] = {name: mean_interval(values) for name, values in named.items()}
        details["kl_by_t"][row], details["standard_error"][row] = (
            result.kl_by_t.tolist(),
            result.standard_error,
        )
    count = len(edges) - 1
    counted = f"{count} of {num_timesteps - 1} KL terms a picture"
    note = f"upper bound, the lower the better; {counted}, guidance 1"
    return Result(scores, "bits/dim", note, details)


def likelihood(evaluation: Evaluation) -> Result:
    """The flow's bound on -log2 p(picture | caption) of `num` real pictures a split, in
    `bound_timesteps` steps.
    """
    process, steps = evaluation.settings.process, evaluation.bound_timesteps or _FLOW_STEPS

    def function(model, x0, captions, _, key, times):
        return {"total": model_bits(model, process, x0, captions, key, times)[None]}

    run, times = _compiled(evaluation, function), np.asarray(flow_times(process.schedule, steps))
    scores = {}
    for row in evaluation.sources:
        found = _on_pictures(evaluation, row, run, times, "likelihood")
        scores[row] = {"total": mean_interval(found["total"][0])}
    note = f"upper bound, the lower the better; Heun's method in {steps} steps, guidance 1"
    return Result(scores, "bits/dim", note)


def branches(evaluation: Evaluation) -> Result:
    """The denoiser with the caption, without it, and with its words in reverse order, by timestep,
    on `num` real pictures a split, noised.
    """
    process = evaluation.settings.process

    def function(model, x0, captions, empty, key, steps):
        return model_branches(model, process, x0, captions, empty, key, steps)

    run = _compiled(evaluation, function)
    timesteps = np.arange(1, _BRANCHES + 1) * process.schedule.num_timesteps // _BRANCHES - 1
    scores = {}
    for row in evaluation.sources:
        found = _on_pictures(evaluation, row, run, timesteps, "branches")
        reverse = _on_pictures(evaluation, row, run, timesteps, "words reversed", in_reverse)
        found["reversed"] = reverse["with"]
        for i, t in enumerate(timesteps):
            scores[f"{row}, t = {t}"] = {
                name: mean_interval(values[i]) for name, values in found.items()
            }
    note = (
        "root mean squares: errors of x0_hat with the caption and without it, and how far apart "
        "the two are; reversed: with the words in reverse order, no worse if that isn't read"
    )
    return Result(scores, "", note)


def _against_real(
    evaluation: Evaluation,
    distance: Callable[[np.ndarray, np.ndarray], dict[str, Estimate]],
    kind: str = "features",
) -> Scores:
    """The distance of each split's samples to its real pictures; and of as many other real
    pictures, what perfect samples would get at this number.
    """

    def whole(features):
        return gather_rows({"features": features})["features"]

    scores = {}
    for row in evaluation.sources:
        real = whole(evaluation.real_features(row, 0, evaluation.reference, kind))
        scores[row] = distance(whole(evaluation.sample_features(row, kind)), real)
        if len(evaluation.sources[row]) >= evaluation.reference + evaluation.num:
            other = whole(evaluation.real_features(row, evaluation.reference, evaluation.num, kind))
            scores[f"{row}, {FLOOR}"] = distance(other, real)
    return scores


def _note(evaluation: Evaluation) -> str:
    kind = "Inception-v3" if isinstance(evaluation.network, Inception) else "attribute classifier"
    return f"{kind} features, {_counts(evaluation)}"


def _counts(evaluation: Evaluation) -> str:
    return f"{evaluation.num} samples, up to {evaluation.reference} real pictures"


def fid(evaluation: Evaluation) -> Result:
    """Frechet distance of the features."""

    def distance(x, y):
        return {"fid": distances.fid(x, y, distances.usual_resamples(x), evaluation.seed)}

    return Result(
        _against_real(evaluation, distance), "", f"{_note(evaluation)}; the lower the better"
    )


def kid(evaluation: Evaluation) -> Result:
    """Unbiased polynomial MMD^2 of the features, from all pairs."""

    def distance(x, y):
        return {
            "kid": distances.mmd2(x, y, distances.polynomial_kernel, True, 200, evaluation.seed)
        }

    return Result(
        _against_real(evaluation, distance), "", f"{_note(evaluation)}; the lower the better"
    )


def precision_recall(evaluation: Evaluation) -> Result:
    """Share of samples near real pictures, and of real pictures near samples."""

    def distance(x, y):
        inside = distances.precision_recall(x, y, _NEIGHBOURS)
        return {
            name: mean_interval(v) for name, v in zip(("precision", "recall"), inside, strict=True)
        }

    note = f"{_note(evaluation)}, k = {_NEIGHBOURS}; the higher the better"
    return Result(_against_real(evaluation, distance), "%", note)


def attributes(evaluation: Evaluation) -> Result:
    """Share of samples in which the classifier sees the attributes of the record whose caption was
    given.
    """
    scores = {}
    for row in evaluation.sources:
        labels = [read_labels(record["attributes"]) for record in evaluation.records(row)]
        answers = correct(
            evaluation.sample_features(row, "logits"), labels, evaluation.network.attributes
        )
        known = {
            name: values
            for name, values in gather_rows(answers).items()
            if not np.isnan(values).all()
        }
        scores[row] = {name: mean_interval(values) for name, values in known.items()}
    return Result(
        scores, "%", "share of samples in which the classifier sees what the caption's record has"
    )


def cmmd(evaluation: Evaluation) -> Result:
    """Gaussian MMD^2 of CLIP's embeddings of the pictures."""

    def distance(x, y):
        return {"cmmd": distances.cmmd(x, y, 200, evaluation.seed)}

    note = f"CLIP of {evaluation.clip_network.name}, {_counts(evaluation)}; the lower the better"
    return Result(_against_real(evaluation, distance, "clip"), "", note)


def clip_score(evaluation: Evaluation) -> Result:
    """Cosines by CLIP of captions with samples, and with the captions' own pictures.

    Their difference is paired by caption.
    """
    clip, scores = evaluation.clip_network, {}
    for row in evaluation.sources:
        captions = clip.embed_captions(evaluation.captions(row))
        real = clip.embed_images([record["image"] for record in evaluation.records(row)])
        rows = gather_rows(
            {
                "clip_score": distances.clip_score(
                    evaluation.sample_features(row, "clip"), captions
                ),
                FLOOR: distances.clip_score(real, captions),
            }
        )
        difference = rows["clip_score"] - rows[FLOOR]
        scores[row] = {
            "clip_score": mean_interval(rows["clip_score"]),
            "minus real": mean_interval(difference),
        }
        scores[f"{row}, {FLOOR}"] = {"clip_score": mean_interval(rows[FLOOR])}
    note = (
        f"CLIP of {clip.name}, 100 max(cos, 0) of samples and captions, the higher the better; "
        "minus real: paired by caption"
    )
    return Result(scores, "", note)


def upsampling(evaluation: Evaluation) -> Result:
    """Held-out pictures, shrunk, as the run and others enlarge them, beside the true ones."""
    row = upsamplers.held_out(evaluation)
    found = upsamplers.contest(evaluation, upsamplers.PixelJudge(evaluation, row))
    note = (
        f"{upsamplers.note(evaluation)}; psnr (dB) and ssim: the higher the better; sharpness: "
        "energy of the gradient, a true picture's is 1"
    )
    return Result(found[0], "", note, found[1], upsamplers.shown(evaluation))


def upsampling_features(evaluation: Evaluation) -> Result:
    """The same pictures' distances to the true ones in features, and their FID."""
    row = upsamplers.held_out(evaluation)
    found = upsamplers.contest(evaluation, upsamplers.FeatureJudge(evaluation, row))
    note = (
        f"{upsamplers.note(evaluation)}; {_note(evaluation)}; feature_distance: root mean square "
        "to the true picture's; layer_distance: as LPIPS, in a classifier's layers; all: the lower "
        "the better"
    )
    return Result(found[0], "", note, found[1])


METRICS: dict[str, Callable[[Evaluation], Result]] = {
    "composition": composition,
    "bound": bound,
    "likelihood": likelihood,
    "branches": branches,
    "fid": fid,
    "kid": kid,
    "precision_recall": precision_recall,
    "attributes": attributes,
    "cmmd": cmmd,
    "clip_score": clip_score,
    "upsampling": upsampling,
    "upsampling_features": upsampling_features,
}
