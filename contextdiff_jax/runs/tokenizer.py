"""The tokenizer of a run, which must fit the text encoder."""

from __future__ import annotations

from pathlib import Path

from contextdiff_jax.data import AnyTokenizer, load_tokenizer
from contextdiff_jax.data.tokenizer import PipelineTokens, clip_length
from contextdiff_jax.pretrained import folder as folders
from contextdiff_jax.pretrained.clip import TEXT
from contextdiff_jax.pretrained.folder_files import read_json
from contextdiff_jax.pretrained.pipeline_folder import (
    encoder_names,
    is_pipeline,
    is_sd3,
    read_index,
)
from contextdiff_jax.pretrained.t5 import MODEL as T5
from contextdiff_jax.settings import Settings


def open_tokenizer(settings: Settings) -> AnyTokenizer:
    """The tokenizer of `data.tokenizer`.

    Raises ValueError, one line, if it is of another kind than the text encoder, or gives ids that
    the encoder's embedding has no row for: their states would be NaN.
    """
    path, encoder = settings.data.tokenizer, settings.text.pretrained
    tokenizer = load_tokenizer(path or None)
    if not encoder:
        if isinstance(tokenizer, PipelineTokens):
            raise ValueError(
                f"data.tokenizer={path!r}: holds several tokenizers; name the folder of one of "
                "them, or by text.pretrained the pipeline whose text encoders read them"
            )
        if tokenizer.vocab_size > settings.text.vocab_size:
            raise ValueError(
                f"text.vocab_size={settings.text.vocab_size}: the tokenizer has "
                f"{tokenizer.vocab_size} ids"
            )
        return tokenizer
    if not is_pipeline(encoder):
        _check(tokenizer, path, Path(encoder))
        return tokenizer
    index = read_index(Path(encoder))
    names = encoder_names(index)
    if len(names) == 1 and not is_sd3(index):
        raise ValueError(
            f"text.pretrained={encoder!r}: a pipeline with one text encoder; name its folder "
            f"{names[0]}"
        )
    wanted = {name: name.replace("text_encoder", "tokenizer") for name in names}
    found = tokenizer.parts if isinstance(tokenizer, PipelineTokens) else {}
    if set(found) != set(wanted.values()):
        raise ValueError(
            f"data.tokenizer={path!r}: must be a folder that holds {', '.join(wanted.values())}, "
            f"which text.pretrained={encoder!r} reads"
        )
    if tokenizer.clip_length != clip_length(encoder):
        raise ValueError(
            f"data.tokenizer={path!r}: CLIP's texts have {tokenizer.clip_length} tokens; "
            f"text.pretrained={encoder!r} reads {clip_length(encoder)}"
        )
    for name, part in wanted.items():
        _check(found[part], str(Path(path, part)), Path(encoder, name))
    return tokenizer


def _check(tokenizer: AnyTokenizer, path: str, encoder: Path) -> None:
    """Raises ValueError for a tokenizer that isn't of the encoder's kind, or has more ids."""
    values = read_json(encoder / folders.CONFIG_FILE, "a folder of a CLIP text or T5 encoder")
    kind, model = ("t5", T5) if values.get("model_type") == "t5" else ("clip", TEXT)
    if getattr(tokenizer, "kind", None) != kind:
        raise ValueError(
            f"data.tokenizer={path!r}: another model's; must be the folder of {kind.upper()}'s "
            f"tokenizer, which text.pretrained={str(encoder)!r} reads"
        )
    rows = folders.read_config(model, encoder).vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"data.tokenizer={path!r}: its ids reach {tokenizer.vocab_size - 1}; the embedding of "
            f"text.pretrained={str(encoder)!r} has rows for 0..{rows - 1}"
        )
