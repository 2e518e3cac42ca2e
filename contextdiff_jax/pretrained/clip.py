"""transformers' CLIP folders <-> `CLIPText` and `CLIPVision`; each is also read from a folder of
the whole CLIP.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from contextdiff_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig
from contextdiff_jax.pretrained import folder as folders
from contextdiff_jax.pretrained.kinds import Model, Options, common_dtype
from contextdiff_jax.pretrained.names import Rules

_WEIGHTS_FILE = "model.safetensors"
_LAYER = (
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.(fc[12])\.", r".mlp.\1."),
    (r"\.self_attn\.to_out\.", ".self_attn.out_proj."),
    (r"\.self_attn\.to_([qkv])\.", r".self_attn.\1_proj."),
    (r"^layers\.", "encoder.layers."),
)
# Indices 0, 1, ..., which transformers before 4.31 stored as a buffer.
_POSITIONS = r"(^|\.)embeddings\.position_ids$"


def _prefix(
    config: CLIPTextConfig | CLIPVisionConfig, prefix: str, projection: str
) -> tuple[tuple[str, str], ...]:
    """`prefix` in front of every name but the projection's, if transformers has the encoder inside
    a whole.
    """
    whole = config.with_projection or config.prefixed_names
    return ((rf"^(?!{projection}\.)", prefix),) if whole else ()


def _text_rules(config: CLIPTextConfig) -> Rules:
    embeddings = (r"^(token|position)_embedding\.", r"embeddings.\1_embedding.")
    return Rules(
        renames=(*_LAYER, embeddings, *_prefix(config, "text_model.", "text_projection")),
        unread=(_POSITIONS, r"^vision_model\.", r"^visual_projection\.", r"^logit_scale$"),
    )


def _vision_rules(config: CLIPVisionConfig) -> Rules:
    embeddings = (r"^((class|patch|position)_embedding)\b", r"embeddings.\1")
    misspelt = (r"^pre_layernorm\.", "pre_layrnorm.")  # as in CLIP's transformers files
    return Rules(
        renames=(
            *_LAYER,
            embeddings,
            misspelt,
            *_prefix(config, "vision_model.", "visual_projection"),
        ),
        unread=(_POSITIONS, r"^text_model\.", r"^text_projection\.", r"^logit_scale$"),
    )


def _values(
    values: Mapping[str, Any], names: Collection[str], part: str, prefix: str, projection: str
) -> dict[str, Any]:
    """The encoder's fields: the config's own, or those of `part` in a whole CLIP's; ours are read
    off the names.
    """
    own = dict(values)
    if values.get("model_type") == "clip" or part in values:
        # Old files repeat the section as NAME_dict, which wins in transformers.
        own = {**values.get(part, {}), **(values.get(part + "_dict") or {})}
        own["projection_dim"] = values.get("projection_dim", 512)
    architectures = values.get("architectures")
    if architectures:
        own["with_projection"] = architectures[0].endswith(("WithProjection", "CLIPModel"))
    else:
        own["with_projection"] = f"{projection}.weight" in names
    own["prefixed_names"] = any(name.startswith(prefix) for name in names)
    return own


def _json(module: CLIPText | CLIPVision, name: str, model_type: str) -> dict[str, Any]:
    architecture = name + ("WithProjection" if module.config.with_projection else "")
    identity = {"architectures": [architecture], "model_type": model_type}
    return identity | common_dtype(module) | module.config.to_dict()


TEXT = Model(
    kind="clip_text",
    weights_file=_WEIGHTS_FILE,
    classes=("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"),
    model_types=("clip_text_model", "clip"),
    make_config=lambda values, names: CLIPTextConfig.from_dict(
        _values(values, names, "text_config", "text_model.", "text_projection")
    ),
    restore_config=CLIPTextConfig,
    to_json=lambda module: _json(module, "CLIPTextModel", "clip_text_model"),
    build=CLIPText,
    rules=_text_rules,
)
VISION = Model(
    kind="clip_vision",
    weights_file=_WEIGHTS_FILE,
    classes=("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"),
    model_types=("clip_vision_model", "clip"),
    make_config=lambda values, names: CLIPVisionConfig.from_dict(
        _values(values, names, "vision_config", "vision_model.", "visual_projection")
    ),
    restore_config=CLIPVisionConfig,
    to_json=lambda module: _json(module, "CLIPVisionModel", "clip_vision_model"),
    build=CLIPVision,
    rules=_vision_rules,
)


def load_clip_text(folder: str | Path, **options) -> CLIPText:
    """CLIP's text encoder from a local folder (a pipeline's `text_encoder/`, or a whole CLIP's).

    `options`: see `contextdiff_jax.pretrained.kinds.Options`.
    """
    return folders.load(TEXT, folder, Options(**options))


def save_clip_text(module: CLIPText, folder: str | Path) -> None:
    """Writes a transformers folder, which `load_clip_text` reads back exactly (and so does
    transformers).
    """
    folders.save(TEXT, module, folder)


def load_clip_vision(folder: str | Path, **options) -> CLIPVision:
    """CLIP's vision encoder from a local folder (a pipeline's `image_encoder/`, or a whole CLIP's).

    `options`: see `contextdiff_jax.pretrained.kinds.Options`.
    """
    return folders.load(VISION, folder, Options(**options))


def save_clip_vision(module: CLIPVision, folder: str | Path) -> None:
    """Writes a transformers folder, which `load_clip_vision` reads back exactly (and so does
    transformers).
    """
    folders.save(VISION, module, folder)
