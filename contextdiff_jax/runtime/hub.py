"""Names of models and data: a folder, a model that ships with the package, or a repository of the
hub.

    find("runs/shapes")              a folder, or a file, that is here: always first
    find("emoji")                    contextdiff_jax/shipped/emoji
    find("ORG/NAME@REVISION/vae")    downloaded once, to huggingface_hub's cache; so is hf://ORG/NAME
    find_data("ORG/NAME")            a data set's folder

`@REVISION` is a branch, a tag or a commit, by default `main`; what follows the name is a part of
the repository. Only what can be read here is downloaded: JSON, text and safetensors, of these the
plain ones where there are half variants, too; of data Parquet and Arrow; no pickles, no programs. A
download that was cut off goes on where it stopped. Without a network what was downloaded serves.
"""

from __future__ import annotations

import functools
import glob
import logging
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from contextdiff_jax.runtime.errors import one_line

LOGGER = logging.getLogger(__name__)
SHIPPED = Path(__file__).parents[1] / "shipped"
SCHEME = "hf://"
_WORD = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
_NAME = re.compile(rf"({_WORD}/{_WORD})(?:@([\w.-]+))?((?:/[\w.-]+)*)", re.ASCII)
# Where every example of this project's writes its runs: a path, though there be no such folder yet.
_OURS = ("runs",)
_DATA = ("*.parquet", "*.arrow", "*.json", "*.md")
_SMALL = ("*.json", "*.txt", "*.model", "*.md", "LICENSE*", "NOTICE*")
_WEIGHTS = ".safetensors"
_VARIANTS = (".fp16", ".bf16", ".non_ema")


class HubName(NamedTuple):
    """`ORG/NAME@REVISION/PART` taken apart. `kind`: of the repository, `model` or `dataset`."""

    repo: str
    revision: str
    part: str
    kind: str = "model"

    def __str__(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return "/".join(filter(None, (f"{self.repo}{at}", self.part)))

    @property
    def command(self) -> str:
        """The command that downloads it, for a machine that has a network."""
        words = ["hf", "download", self.repo]
        if self.kind != "model":
            words += ["--repo-type", self.kind]
        if self.revision != "main":
            words += ["--revision", self.revision]
        return shlex.join(words)


def shipped_names() -> list[str]:
    """The models that ship with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def parse_name(text: str) -> HubName | None:
    """The parts of a hub's name; None for a path, which is what begins with something that is here
    (FILE.safetensors/unet, too), or with `runs`. `hf://` says that it is a name.
    """
    given = text.removeprefix(SCHEME)
    match = _NAME.fullmatch(given.rstrip("/"))
    if match is None or {".", ".."} & set(given.split("/")):
        if given != text:
            raise ValueError(f"{text}: no name of the hub's; must be {SCHEME}ORG/NAME[@REVISION]")
        return None
    owner = match[1].partition("/")[0]
    if given == text and (owner in _OURS or os.path.lexists(owner)):
        return None
    return HubName(match[1], match[2] or "main", match[3].strip("/"))


def find(path: str | os.PathLike) -> str:
    """The local path of the model, or of the part of one, that `path` names; buckets' paths, and
    paths where nothing is, as they are.

    Raises ValueError, one line, for a repository that isn't there or can't be reached and was not
    downloaded before; it names the command that downloads it.
    """
    text = os.fspath(path)
    if not text or ("://" in text and not text.startswith(SCHEME)):
        return text
    shipped = SHIPPED / text
    if text in shipped_names() and not _is_model(Path(text)):
        return str(shipped)
    if os.path.exists(text):
        return text
    name = parse_name(text)
    return text if name is None else str(download(name))


def find_model(path: str | os.PathLike) -> str:
    """`find`; ValueError, with the names of the shipped models, for a single word that is none of
    them and no folder.
    """
    found = find(path)
    if "/" not in os.fspath(path) and not os.path.exists(found):
        names = ", ".join(shipped_names()) or "none"
        raise ValueError(
            f"{found}: holds neither a trained run (config.json) nor a Stable Diffusion pipeline "
            f"(model_index.json): no such folder; models that ship with the package: {names}"
        )
    return found


def find_data(path: str) -> str:
    """`find`, of a data set."""
    if "://" in path and not path.startswith(SCHEME) or os.path.exists(path):
        return path
    name = parse_name(path)
    return path if name is None else str(download(name._replace(kind="dataset")))


def _is_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "model_index.json"))


def download(name: HubName) -> Path:
    """The folder, or the file, of the name in huggingface_hub's cache, with all that is read of it.

    Raises ValueError: see `find`.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    with _explained(name):
        fetch = functools.partial(
            snapshot_download, name.repo, repo_type=name.kind, tqdm_class=_bar()
        )
        if name.kind == "dataset":
            patterns = [f"{_inside(name)}{pattern}" for pattern in _DATA]
            return _part(Path(fetch(revision=name.revision, allow_patterns=patterns)), name)
        patterns = [f"{_inside(name)}{pattern}" for pattern in _SMALL]
        if name.part:
            patterns.append("model_index.json")
        folder = Path(fetch(revision=name.revision, allow_patterns=patterns))
        try:
            tree = get_cached_repo_tree(name.repo, revision=folder.name)
        except CachedRepoTreeNotFoundError:  # of an older huggingface_hub, which kept no list
            return _part(folder, name)
        files = wanted_files([file.path for file in tree], name.part)
        if not all((folder / file).exists() for file in files):
            LOGGER.info("downloading %s", name)
            fetch(revision=folder.name, allow_patterns=[glob.escape(file) for file in files])
    return _part(folder, name)


def wanted_files(files: Sequence[str], part: str = "") -> list[str]:
    """Those of a repository's files that are read: small ones, and the weights of `part` (all).

    Of a pipeline the weights beside model_index.json are whole pipelines again; a half variant is
    read only where there is no plain file; pickles are not read.
    """
    inside = [file for file in files if not part or file == part or file.startswith(f"{part}/")]
    small = [file for file in inside if any(PurePosixPath(file).match(one) for one in _SMALL)]
    weights = [file for file in inside if file.endswith(_WEIGHTS)]
    if not part and "model_index.json" in files:
        weights = [file for file in weights if "/" in file]
    if part.endswith(_WEIGHTS):  # a single-file checkpoint: its tokenizers lie beside it
        small += [file for file in files if file.partition("/")[0].startswith("tokenizer")]
    return sorted({*small, *_plain(weights)})


def _plain(weights: Iterable[str]) -> Iterator[str]:
    """Without half variants of what is there in full."""
    by_stem: dict[str, dict[str, list[str]]] = {}
    for file in weights:
        folder, _, base = file.rpartition("/")
        variant = next((v for v in _VARIANTS if f"{v}." in base or f"{v}-" in base), "")
        stem = re.sub(r"-\d{5}-of-\d{5}", "", base.replace(variant, "") if variant else base)
        by_stem.setdefault(f"{folder}/{stem}", {}).setdefault(variant, []).append(file)
    for variants in by_stem.values():
        first = next(v for v in ("", *_VARIANTS) if v in variants)
        yield from variants[first]


def _bar() -> type:
    """huggingface_hub's bar, on terminals alone."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        """A bar that a log doesn't show."""

        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **{"disable": None} | options)

    return Bar


def _inside(name: HubName) -> str:
    """The prefix of the patterns for the small files that a part needs."""
    if not name.part or name.part.endswith(_WEIGHTS):
        return ""
    return f"{glob.escape(name.part)}/"


def _part(folder: Path, name: HubName) -> Path:
    path = folder / name.part
    if not path.exists():
        raise ValueError(f"{name}: {name.repo} has no {name.part}")
    return path


@contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """Turns the hub's errors into one line that says what to do."""
    from httpx2 import HTTPError
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name}: {name.repo} has no revision {name.revision!r}") from None
    except (errors.RepositoryNotFoundError, errors.GatedRepoError) as error:
        gated = isinstance(error, errors.GatedRepoError)
        lack = "is gated: accept its terms on its page" if gated else "there is no such repository"
        raise ValueError(
            f"{name}: no such folder here, and on the hub {lack}, or it needs a token: `hf auth "
            "login`"
        ) from None
    except errors.HfHubHTTPError as error:
        raise ValueError(f"{name}: can't be downloaded ({one_line(error)[:300]})") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, HTTPError) as error:
        part = isinstance(error, errors.IncompleteSnapshotError)
        state = "was downloaded in part" if part else "is no folder here and was not downloaded"
        raise ValueError(
            f"{name}: {state}, and the hub can't be reached; where it can, run: {name.command}"
        ) from None
    except (errors.HFValidationError, OSError) as error:
        raise ValueError(f"{name}: can't be downloaded ({one_line(error)[:300]})") from None


def upload(folder: str | os.PathLike, name: str, message: str, **options: Any) -> str:
    """Uploads a folder to the repository `ORG/NAME`, or to a branch of it, `@REVISION`; it is made
    if there is none. Returns the address of the commit. `options`: `private`, `token`.

    Raises ValueError, one line, for what the hub refuses.
    """
    from huggingface_hub import HfApi

    given = name.removeprefix(SCHEME)
    match = _NAME.fullmatch(given)
    if match is None or match[3]:
        raise ValueError(f"{name}: must be ORG/NAME or ORG/NAME@BRANCH")
    target = HubName(match[1], match[2] or "main", "")
    private = options.pop("private", None)
    api = HfApi(**options)
    with _refused(target):
        api.create_repo(target.repo, private=private, exist_ok=True)
        if target.revision != "main":
            api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        made = api.upload_folder(
            repo_id=target.repo,
            folder_path=folder,
            revision=target.revision,
            commit_message=message,
        )
    return made.commit_url


@contextmanager
def _refused(name: HubName) -> Iterator[None]:
    from httpx2 import HTTPError
    from huggingface_hub import errors

    try:
        yield
    except (HTTPError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, ValueError) as error:
        raise ValueError(
            f"{name}: the hub doesn't take it ({one_line(error)[:300]}); `hf auth login` stores a "
            "token that may write"
        ) from None
