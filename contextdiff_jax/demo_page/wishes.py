"""What a visitor asks for, checked: the controls of the page, or the text of a PNG made here."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping
from typing import Any

from contextdiff_jax.demo_page.limits import MAX_GAIN, MAX_GUIDANCE, MAX_STEPS, MAX_TEXT
from contextdiff_jax.diffusion import get_sampler
from contextdiff_jax.runtime.keys import LARGEST


def check_text(name: str, text: Any, needed: bool = True) -> str:
    """Return the text without blanks at its ends.

    Raises ValueError, one sentence, for one that is missing, too long or no Unicode.
    """
    if not isinstance(text, str | None):
        raise ValueError(f"{name} must be a text.")
    text = (text or "").strip()
    if needed and not text:
        raise ValueError(f"{name} is empty: write a few words.")
    if len(text) > MAX_TEXT:
        raise ValueError(f"{name} has {len(text):,} characters; at most {MAX_TEXT:,} are read.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a character (a lone surrogate).") from None
    return text


def check_number(name: str, value: Any, low: float, high: float, whole: bool = False) -> float:
    """Return the number.

    Raises ValueError, one sentence, for what is none, isn't whole, or lies outside of the range.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high or (whole and number != int(number)):
        kind = "a whole number" if whole else "a number"
        shown = html.escape(repr(value)[:40])
        raise ValueError(f"{name} must be {kind} from {low:g} to {high:g}, not {shown}.")
    return int(number) if whole else number


def check_seed(value: Any) -> int:
    """Return the seed, a text's or a number's. Raises ValueError, one sentence, for another."""
    text = str(value if value is not None else "").strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= 20 and int(text) <= LARGEST):
        raise ValueError(f"The seed must be a whole number from 0 to {LARGEST}.")
    return int(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """A picture that is asked for.

    Attributes:
      prompt, negative, seed, sampler, steps, guidance: as of `Pipeline`.
      gain: factor of the learned context, 0 is plain diffusion.
      strength: with a picture to start from, the share of the steps that are made.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    sampler: str = "ddim"
    steps: int = 25
    guidance: float = 3.0
    gain: float = 1.0
    strength: float = 0.8

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Wish:
        """Return the wish of the page's controls, by name.

        Raises ValueError, one sentence, for what isn't allowed.
        """
        sampler = values["sampler"]
        get_sampler(sampler if isinstance(sampler, str) else "")
        return cls(
            prompt=check_text("The prompt", values["prompt"]),
            negative=check_text("The negative prompt", values["negative"], needed=False),
            seed=check_seed(values["seed"]),
            sampler=sampler,
            steps=check_number("The number of steps", values["steps"], 1, MAX_STEPS, whole=True),
            guidance=check_number("The guidance", values["guidance"], 0, MAX_GUIDANCE),
            gain=check_number("The context gain", values["gain"], 0, MAX_GAIN),
            strength=check_number("The strength", values["strength"], 0, 1),
        )

    @classmethod
    def of_metadata(cls, texts: Mapping[str, str], otherwise: Wish) -> Wish:
        """Return the wish that a PNG of this page, or of `sample --images`, was made by; what it
        doesn't say is `otherwise`'s.

        Raises ValueError, one sentence, for a PNG without settings, and for values that are none.
        """
        if "prompt" not in texts or "seed" not in texts:
            raise ValueError(
                "This PNG carries no settings: only pictures made here, or by the command sample, "
                "do. Editors and messengers often remove them."
            )
        values = dataclasses.asdict(otherwise) | {"negative": ""}
        names = {"context_scale": "gain"}
        given = {names.get(name, name): value for name, value in texts.items()}
        return cls.read(values | {name: given[name] for name in values.keys() & given.keys()})

    @property
    def options(self) -> dict[str, Any]:
        """The options of `Pipeline`, but for prompt, gain and strength."""
        return {
            "negative": self.negative or None,
            "seed": self.seed,
            "sampler": self.sampler,
            "steps": self.steps,
            "guidance": self.guidance,
        }

    @property
    def metadata(self) -> dict[str, Any]:
        """The text of its PNG, by the names that the command `sample` writes too."""
        values = dataclasses.asdict(self)
        return {"context_scale" if name == "gain" else name: v for name, v in values.items()}
