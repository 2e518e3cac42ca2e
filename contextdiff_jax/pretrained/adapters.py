"""PEFT's settings of an adapter, from adapter_config.json or a file's metadata: how strong each
layer's change is.

PEFT scales a layer by alpha / r, or by alpha / sqrt(r) with `use_rslora`; `alpha_pattern` and
`rank_pattern` give alpha and r of single layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_ALPHA = 8  # PEFT's default
# Settings that say how an adapter was trained or where it lies, or that `alpha` reads. Others
# change what the weights mean, unless they are off.
_READ = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "peft_type",
    "init_lora_weights",
    "bias",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_version",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
    "fan_in_fan_out",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
)
# Values that leave the base weights as they are; the others (PiSSA, OLoRA, LoftQ, ...) change them.
_CHOICES = {
    "peft_type": (None, "LORA"),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


@dataclasses.dataclass(frozen=True)
class AdapterSettings:
    """The settings of one adapter. `source` begins errors.

    Raises ValueError, one line with setting and value, for what would make the change another one:
    DoRA, other kinds of adapters, changed base weights, biases, whole modules.
    """

    source: str
    values: Mapping[str, Any]

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            value = self.values.get(name)
            if value not in allowed:
                self._refuse(name, f"only {', '.join(map(str, allowed[1:]))}")
        for name, value in self.values.items():
            if name not in _READ and value:
                self._refuse(name, "only plain LoRA is read")
        for name in ("alpha_pattern", "rank_pattern"):
            if not isinstance(self.values.get(name) or {}, Mapping):
                self._refuse(name, "must map names of layers to numbers")

    def alpha(self, layer: str, rank: int) -> float:
        """The numerator of the scale alpha / rank. ValueError if the settings give another rank.

        Args:
          layer: its name in the network that was adapted. rank: of the stored matrices.
        """
        told = self._number("r", "rank_pattern", layer, rank)
        if told != rank:
            raise ValueError(
                f"{self.source}: r={told:g} for {layer}, whose weights have rank {rank}"
            )
        alpha = self._number("lora_alpha", "alpha_pattern", layer, _ALPHA)
        return alpha * rank**0.5 if self.values.get("use_rslora") else alpha

    def _number(self, name: str, pattern: str, layer: str, default: float) -> float:
        """A setting's value for a layer: that of the first pattern that its name ends with."""
        value = self.values.get(name, default)
        for key, own in (self.values.get(pattern) or {}).items():
            try:
                matches = re.match(rf"(.*\.)?({key})$", layer)
            except re.error as error:
                raise ValueError(f"{self.source}: {pattern}: {key!r}: {error}") from None
            if matches:
                name, value = f"{pattern}[{key!r}]", own
                break
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise ValueError(f"{self.source}: {name}={value!r}: must be a positive number")
        return float(value)

    def _refuse(self, name: str, allowed: str) -> None:
        raise ValueError(f"{self.source}: {name}={self.values[name]!r}: not supported; {allowed}")
