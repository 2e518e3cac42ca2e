"""The section `train` of a config."""

from __future__ import annotations

import dataclasses

from contextdiff_jax.models.flash import CHOICES
from contextdiff_jax.models.remat import POLICIES
from contextdiff_jax.runtime.fields import check_at_least, check_choice

DECAYS = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "muon")
PRECISIONS = ("float32", "bfloat16")
PARTS = ("full", "lora", "context")
PLAIN_MEAN = 12**-0.5  # the length of the mean of all steps, which is the longest average
# What every line of metrics.jsonl has but the quartiles of t, which a small batch may lack.
LOGGED = (
    "loss",
    "denoise_loss",
    "context_loss",
    "prior_kl",
    "context_gain",
    "grad_norm",
    "learning_rate",
    "nonfinite",
    "broken_records",
    "images_per_second",
    "seconds_per_step",
    *(f"loss_q{i}" for i in range(1, 5)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation and its housekeeping. Sizes and counts are global; `*_every` are in steps (0:
    never).
    """

    steps: int = 1000  # updates of the parameters
    batch_size: int = 64  # examples a step, of all devices together
    accumulation: int = 1  # equal parts of a batch, one after another
    optimizer: str = "adamw"  # muon: kernels by Muon, all else by AdamW
    learning_rate: float = 1e-3  # the largest, at the end of the warm-up
    warmup_steps: int = 100  # over which it rises from 0
    decay: str = "cosine"  # after the warm-up, to 0 at `steps`
    weight_decay: float = 0.0  # a step's share of the weights, times the learning rate
    b1: float = 0.9  # AdamW's decay of the gradient's mean
    b2: float = 0.99  # AdamW's decay of the mean of its square
    clip_norm: float = 1.0  # longest gradient; a longer one is scaled down to it
    ema_decay: float = 0.999  # of the average of the parameters, which samples are drawn with
    # lengths of averages that are kept beside it, as shares of training; some, as in (0.05, 0.1),
    # let `sample --ema_length` make any other
    power_ema: tuple[float, ...] = ()
    power_ema_every: int = 500  # steps from one snapshot of those to the next
    # share of the captions that are replaced by the empty one, for guidance
    caption_dropout: float = 0.1
    # lora: LoRA and the context; context: the relational network and the context head
    trainable: str = "full"
    lora_rank: int = 8  # of trainable=lora
    init_from: str = ""  # a run whose EMA weights a new run starts from
    precision: str = (
        "float32"  # of products and activations; parameters, statistics, process, loss: float32
    )
    # what a block keeps for the backward pass: everything, products, kernels, or nothing (blocks)
    remat: str = "none"
    # self-attention: xla, splash (TPU), tiles (CPU), cudnn (GPU), or what suits platform and length
    attention: str = "auto"
    unroll: bool = False  # writes a transformer's layers out instead of one loop over them
    # KiB of a TPU's on-chip memory that one operation may work in (0: as its compiler has it)
    tpu_scoped_memory: int = 0
    log_every: int = 50  # steps from one line of metrics.jsonl to the next
    checkpoint_every: int = 500  # steps from one checkpoint to the next
    keep_checkpoints: int = 2  # the newest
    keep_best: int = 0  # and those with the lowest `best_metric` at the log line before
    best_metric: str = "loss"  # of keep_best: a name of metrics.jsonl, the lowest is the best
    sample_every: int = 500  # steps from one grid of samples to the next; 0: never
    max_nonfinite: int = (
        3  # steps without a finite loss and gradient that are skipped; the next ends the run
    )
    peer_timeout: int = (
        600  # seconds after which a process that is lost or stands still ends the others
    )
    # the first and the last step of which a trace is written (docs/watching.md); (): none
    profile_steps: tuple[int, ...] = ()

    def __post_init__(self):
        check_choice("train.optimizer", self.optimizer, OPTIMIZERS)
        check_choice("train.decay", self.decay, DECAYS)
        check_choice("train.precision", self.precision, PRECISIONS)
        check_choice("train.trainable", self.trainable, PARTS)
        check_choice("train.remat", self.remat, POLICIES)
        check_choice("train.attention", self.attention, CHOICES)
        check_at_least(
            self,
            "train",
            steps=1,
            batch_size=1,
            accumulation=1,
            lora_rank=1,
            log_every=1,
            power_ema_every=1,
            checkpoint_every=1,
            sample_every=0,
            keep_checkpoints=1,
            keep_best=0,
            max_nonfinite=0,
            tpu_scoped_memory=0,
            peer_timeout=1,
            warmup_steps=0,
            learning_rate=0,
            clip_norm=0,
            weight_decay=0,
        )
        check_choice("train.best_metric", self.best_metric, LOGGED)
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"train.accumulation={self.accumulation}: must divide "
                f"train.batch_size={self.batch_size}"
            )
        for field in ("ema_decay", "caption_dropout", "b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"train.{field}={getattr(self, field)}: must lie in [0, 1)")
        steps = self.profile_steps
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1] <= self.steps):
            raise ValueError(
                f"train.profile_steps={steps}: must be the first and the last step, as in "
                f"(10, 12), of 1..{self.steps}"
            )
        for length in self.power_ema:
            check_length("train.power_ema", length)
        if len(set(self.power_ema)) < len(self.power_ema):
            raise ValueError(f"train.power_ema={self.power_ema}: names a length twice")

    def refuse_power_ema(self, what: str) -> None:
        """Raises ValueError where `power_ema` is set, for the training `what`, which none reads."""
        if self.power_ema:
            raise ValueError(f"train.power_ema={self.power_ema}: must be () for {what}")


def check_length(field: str, length: float) -> None:
    """Raises ValueError, naming `field`, for what can't be an average's length."""
    if not 0 < length < PLAIN_MEAN:
        raise ValueError(
            f"{field}={length}: a length, as a share of training, must lie between 0 and "
            f"{PLAIN_MEAN:.4f}, the plain mean's"
        )
