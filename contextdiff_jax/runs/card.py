"""The card of a model: README.md with the facts that the hub shows, and how to make pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from contextdiff_jax.settings import Settings

_TAGS = ("contextdiff", "diffusion", "jax", "flax")


def make_card(
    settings: Settings,
    name: str,
    facts: Mapping[str, Any],
    *,
    license: str | None = None,
    text: str | None = None,
) -> str:
    """The card of a trained model, called `name`.

    Args:
      facts: `step`, `parameters` and `dtype`, of what is stored.
      license: its name, as the hub has it. text: what follows the head, instead of what is made
          here; a text that begins with a head of its own is taken as it is.
    """
    if text is not None and text.startswith("---\n"):
        return text
    return head(license) + (text if text is not None else _body(settings, name, facts))


def folder_card(name: str, license: str | None = None) -> str:
    """The card of a Stable Diffusion folder that has none."""
    return f"{head(license)}# {name}\n\nA Stable Diffusion pipeline, in diffusers' format.\n\n" + (
        _usage(name, "a horse in the snow")
    )


def head(license: str | None = None) -> str:
    """The block between two lines of ---, which the hub reads."""
    lines = [f"license: {license}"] if license else []
    lines += ["library_name: contextdiff_jax", "pipeline_tag: text-to-image", "tags:"]
    return "\n".join(["---", *lines, *(f"- {tag}" for tag in _TAGS), "---", "", ""])


def _body(settings: Settings, name: str, facts: Mapping[str, Any]) -> str:
    data, sample, context = settings.data, settings.sample, settings.context
    space = "latents of its own autoencoder" if settings.latent.vae else "pixels"
    prompts = list(sample.prompts) or ["a large red circle"]
    shift = "none" if context.network.is_zero else f"`{context.kind}`, shift `{context.shift}`"
    rows = {
        "pictures": f"{data.image_size} pixels a side, diffused in {space}",
        "parameters": f"{facts['parameters'] / 1e6:.2f} M, stored as {facts['dtype']}",
        "trained": f"{facts['step']:,} steps of {settings.train.batch_size} pictures, "
        f"`data.source={data.source}`",
        "process": f"`{settings.diffusion.schedule}`, predicts "
        f"`{settings.diffusion.prediction_type}`",
        "context": shift,
        "sampled by": f"`{sample.sampler}`, {sample.steps} steps, guidance {sample.guidance:g}",
    }
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    examples = "\n".join(f"- {prompt}" for prompt in prompts[:8])
    return (
        f"# {name}\n\nText to image by ContextDiff (Yang et al., ICLR 2024), which shifts both "
        "directions of diffusion\nby a learned context of picture and text.\n\n"
        f"{_usage(name, prompts[0])}\n"
        f"| | |\n|---|---|\n{table}\n\nPrompts that it was shown while it trained:\n\n{examples}\n"
    )


def _usage(name: str, prompt: str) -> str:
    shown = prompt.replace('"', "'")
    return (
        f'```bash\npython -m contextdiff_jax.sample --model={name} --prompt="{shown}" --num=4\n'
        "```\n\n```python\nfrom contextdiff_jax import Pipeline\n\n"
        f"pipeline = Pipeline.open({json.dumps(name)})\n"
        f"pictures = pipeline.text_to_image([{json.dumps(prompt)}], num=4)  # uint8 [4, H, W, 3]\n"
        "```\n"
    )
