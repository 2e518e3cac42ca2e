"""python -m contextdiff_jax.train_vae --config=vae_emoji --config.data.path=FOLDER --workdir=DIR

Train a small autoencoder for latent training, or go on with it. Writes DIR/vae, a diffusers
AutoencoderKL folder whose scaling_factor is measured on the data, and DIR/reconstructions.png,
pictures that it has not seen beside what it makes of them.
"""

from __future__ import annotations

from contextdiff_jax import cli
from contextdiff_jax.runtime import host

WORKDIR = cli.define_path(
    "workdir", None, "Folder of the run: everything it writes, and what it resumes from."
)


def main() -> None:
    """Parses, then trains."""
    config = cli.read_config()
    workdir = cli.output_folder("workdir", WORKDIR.value)
    from contextdiff_jax.runs.workdir import held
    from contextdiff_jax.settings.autoencoder import parse_autoencoder
    from contextdiff_jax.training.autoencoder import train_autoencoder

    settings = parse_autoencoder(config)
    host.set_compilation_cache(workdir)
    with held(workdir):
        report = train_autoencoder(settings, config, workdir)
    print(
        f"{workdir / 'vae'}: " + ", ".join(f"{name} {value:.4g}" for name, value in report.items())
    )


def command() -> None:
    """Run `main` with the flags of the command line; contextdiff-train-vae begins here."""
    cli.define_config()
    cli.run(main)


if __name__ == "__main__":
    command()
