"""transformers' T5 folders <-> `contextdiff_jax.models.t5.T5Encoder`; a whole T5's folder is read
as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contextdiff_jax.models.t5 import T5Config, T5Encoder
from contextdiff_jax.pretrained import folder as folders
from contextdiff_jax.pretrained.kinds import Model, Options, common_dtype
from contextdiff_jax.pretrained.names import Rules


def _rules(config: T5Config) -> Rules:
    return Rules(
        renames=(
            (r"^(blocks|final_layer_norm)\.", r"encoder.\1."),
            (
                r"^relative_attention_bias\.",
                "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.",
            ),
            (r"^encoder\.blocks\.(\d+)\.(norm1|attention)\.", r"encoder.block.\1.layer.0.\2."),
            (r"^encoder\.blocks\.(\d+)\.(norm2|ff)\.", r"encoder.block.\1.layer.1.\2."),
            (r"\.norm[12]\.", ".layer_norm."),
            (r"\.attention\.to_out\.", ".SelfAttention.o."),
            (r"\.attention\.to_([qkv])\.", r".SelfAttention.\1."),
            (r"\.ff\.", ".DenseReluDense."),
            (r"\.wi_0\." if not config.gated else "$^", ".wi."),
        ),
        # The decoder and its head, and the encoder's copy of the shared embedding.
        unread=(r"^decoder\.", r"^lm_head\.", r"^encoder\.embed_tokens\."),
        copies=tuple(
            ("shared.weight", f"{part}.embed_tokens.weight") for part in ("encoder", "decoder")
        ),
    )


def _json(module: T5Encoder) -> dict[str, Any]:
    identity = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "is_encoder_decoder": False,
    }
    return identity | common_dtype(module) | module.config.to_dict()


MODEL = Model(
    kind="t5",
    weights_file="model.safetensors",
    classes=("T5EncoderModel", "T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel"),
    model_types=("t5",),
    make_config=lambda values, names: T5Config.from_dict(values),
    restore_config=T5Config,
    to_json=_json,
    build=T5Encoder,
    rules=_rules,
)


def load_t5(folder: str | Path, **options: Any) -> T5Encoder:
    """T5's encoder from a local folder; for `options` see `pretrained.model.Options`."""
    return folders.load(MODEL, folder, Options(**options))


def save_t5(module: T5Encoder, folder: str | Path) -> None:
    """Writes a transformers folder, which `load_t5` and transformers read back exactly."""
    folders.save(MODEL, module, folder)
