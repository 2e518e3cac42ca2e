"""The configs as modules and by name: `contextdiff_jax.configs.shapes`, `--config=shapes`.

Their files stand in configs/ beside the package in a clone, and inside the package in an
installation (setup.py): site-packages gets no folder `configs`, a name that many projects use. In
both, this module is their package.
"""

from __future__ import annotations

import pathlib

_PACKAGE = pathlib.Path(__file__).parent
# The installed folder first: what lies beside an installed package is somebody else's.
FOLDER = next(
    folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()
)
__path__ = [str(FOLDER)]  # what makes a module a package


def names(kind: str = "") -> list[str]:
    """Return the names of the configs, or of those of a `kind`: experiments."""
    return sorted(file.stem for file in (FOLDER / kind).glob("*.py"))


def find(value: str, kind: str = "") -> pathlib.Path:
    """Return the file that `value` names: a path; or a config of the package, by its name or by its
    path in a clone, so that a documented command runs in any folder.

    Raises ValueError, with the names there are, for a file that isn't there.
    """
    path = pathlib.Path(value)
    found = [path, FOLDER.parent / path] if path.parts[:1] == ("configs",) else [path]
    if value in names(kind):
        found.append(FOLDER / kind / f"{value}.py")
    for file in found:
        if file.is_file():
            return file
    raise ValueError(f"{value}: no such file; by name there are {', '.join(names(kind))}")
