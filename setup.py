"""What pyproject.toml can't say: configs/ as a part of the package, extras from their files."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
CONFIGS = "contextdiff_jax.configs"  # contextdiff_jax/configs.py says why
KINDS = [f"{CONFIGS}.{file.parent.name}" for file in (ROOT / "configs").glob("*/*.py")]


def read_extra(file: Path) -> list[str]:
    """Return a requirements file's packages. `-r requirements.txt` is in every installation."""
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-")]


setup(
    packages=[*find_packages(include=["contextdiff_jax*"]), CONFIGS, *sorted({*KINDS})],
    package_dir={CONFIGS: "configs"},
    extras_require={
        file.stem.removeprefix("requirements-"): read_extra(file)
        for file in sorted(ROOT.glob("requirements-*.txt"))
    },
)
