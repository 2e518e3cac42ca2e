"""python -m contextdiff_jax.train_tokenizer --corpus=FILE --out=tokenizer.json --vocab_size=4096

Train a caption tokenizer on plain text, one document a line.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from contextdiff_jax import cli

CORPUS = cli.define_paths("corpus", "A text file; may be given many times.")
OUT = cli.define_path("out", None, "Tokenizer file to write.")
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Tokens, at most.", lower_bound=1)


def main() -> None:
    """Reads the texts, trains, writes."""
    out = cli.output_file("out", OUT.value)
    if not CORPUS.value:
        raise ValueError("--corpus: missing; name a text file")
    for path in CORPUS.value:
        if not Path(path).is_file():
            raise ValueError(f"--corpus={path}: is not a file")
    from contextdiff_jax.data.tokenizer import train_tokenizer
    from contextdiff_jax.runtime.texts import read_lines

    lines = [line for path in CORPUS.value for line in read_lines(path, "--corpus")]
    tokenizer = train_tokenizer(lines, VOCAB_SIZE.value)
    tokenizer.save(str(out))
    print(f"{out}: {tokenizer.get_vocab_size()} tokens")


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-train-tokenizer begins here."""
    cli.run(main)


if __name__ == "__main__":
    command()
