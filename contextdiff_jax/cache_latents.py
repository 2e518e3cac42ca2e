"""python -m contextdiff_jax.cache_latents --config=emoji_latent --out=cache --split=train

Encode a config's pictures once, for training on their latents. The folder gets the latents (mean
and standard deviation), token ids and captions (with --text_dtype also what the frozen text encoder
gives of them, so that training doesn't load it; then of a config without an autoencoder the
pictures, too), which --config.data.source=cache
--config.data.path=FOLDER trains on. The config is the one to train with: it names the autoencoder
(latent.vae, or model.pretrained). A run that was killed goes on with the shards that aren't there;
processes share the shards.
"""

from __future__ import annotations

from absl import flags

from contextdiff_jax import cli

OUT = cli.define_path("out", None, "Folder of the cache.")
SPLIT = flags.DEFINE_string("split", "train", "Of the data.")
SHARD_SIZE = flags.DEFINE_integer("shard_size", 1024, "Records a file.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 16, "Pictures that are encoded at once.", lower_bound=1
)
DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "Of the moments.")
TEXT_DTYPE = flags.DEFINE_enum(
    "text_dtype",
    None,
    ["float16", "float32"],
    "Also keep the captions' states by text.pretrained, in this type.",
)


def main() -> None:
    """Parses, encodes, writes shard by shard."""
    config = cli.read_config()
    out = cli.output_folder("out", OUT.value)

    from contextdiff_jax.pretrained.finetuning import adopt
    from contextdiff_jax.settings import parse
    from contextdiff_jax.training.latent_cache import write_cache

    cache, new = write_cache(
        parse(adopt(config)),
        out,
        split=SPLIT.value,
        shard_size=SHARD_SIZE.value,
        batch_size=BATCH_SIZE.value,
        dtype=DTYPE.value,
        text_dtype=TEXT_DTYPE.value or "",
    )
    print(
        f"{OUT.value}: {cache.num_shards} shards, {new} of them written now, {cache.num_records} "
        f"records of {cache.shape}"
    )


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-cache-latents begins here."""
    cli.define_config()
    cli.run(main)


if __name__ == "__main__":
    command()
