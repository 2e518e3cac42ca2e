"""Pages of the site's reference, written from the code each time that the site is built.

python launch/docs_reference.py     prints them; launch/docs_pages.py adds them to the site
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import pathlib
import pkgutil
import re
import sys
import tokenize
from collections.abc import Callable, Mapping
from typing import Any

from configs import base, edit_shapes
from contextdiff_jax import cli
from contextdiff_jax.data.records import PictureConfig
from contextdiff_jax.editing.settings import EditConfig, VideoConfig
from contextdiff_jax.models.backbones import BACKBONES
from contextdiff_jax.models.vae import VAEConfig
from contextdiff_jax.runtime.fields import check_types, defaults, strict
from contextdiff_jax.settings import (
    DERIVED,
    Settings,
    default_config,
    default_model,
    read_data,
)
from contextdiff_jax.settings.autoencoder import AutoencoderLoss

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from command_flags import flags_of  # noqa: E402  one reader of a command's flags, the tests'

NOT_ALLOWED = ("?", -7, 1e9)  # values that tell what a field takes, by the error that they raise
# The names that a field takes, where its section's check leaves them to who reads them.
TABLES = {field: pkgutil.resolve_name(table) for field, table in cli.FIELDS.items()}
TABLES["model.kind"] = BACKBONES
Check = Callable[[Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a config: its dataclass, its defaults, and what checks its values."""

    name: str
    cls: type
    defaults: Mapping[str, Any]
    check: Check
    title: str = ""


def sections() -> list[Section]:
    """Every section that a config of a command may have."""
    found = []
    hints = {field.name: field.type for field in dataclasses.fields(Settings)}
    config = default_config()
    for name, cls in Settings.__annotations__.items():
        cls = getattr(sys.modules[Settings.__module__], str(hints[name]), None)
        if dataclasses.is_dataclass(cls):
            check = checked_data if name == "data" else strict_check(cls, name)
            found.append(Section(name, cls, config[name], check))
        elif name == "model":
            found += [backbone(kind) for kind in BACKBONES]
    vae = strict_check(VAEConfig, "vae")
    return [
        *found,
        Section("video", VideoConfig, defaults(VideoConfig), checked_edit("video", VideoConfig)),
        Section("edit", EditConfig, defaults(EditConfig), checked_edit("edit", EditConfig)),
        Section("vae", VAEConfig, defaults(VAEConfig), vae, "`vae`, of `train_vae`"),
        Section(
            "loss",
            AutoencoderLoss,
            defaults(AutoencoderLoss),
            strict_check(AutoencoderLoss, "loss"),
            "`loss`, of `train_vae`",
        ),
    ]


def checked_data(values: Mapping[str, Any]) -> None:
    """The checks of a config's `data`, and those of the sources that read pictures."""
    read_data(values)
    known = {field.name for field in dataclasses.fields(PictureConfig)}
    PictureConfig(**{"path": ""} | {k: v for k, v in values.items() if k in known})


def strict_check(cls: type, name: str) -> Check:
    """What `parse` does with a section."""
    return lambda values: strict(cls, name, values)


def checked_edit(name: str, cls: type) -> Check:
    """The check of a section of an editing config, whose prompts must not be empty."""
    known = edit_shapes.get_config()[name].to_dict()
    return lambda values: strict(cls, name, known | dict(values))


def backbone(kind: str) -> Section:
    """The section `model` of a kind of backbone."""
    cls = BACKBONES[kind].config

    def check(values: Mapping[str, Any]) -> Any:
        fields = {k: v for k, v in values.items() if k not in ("kind", "pretrained")}
        check_types(cls, "model", fields)
        return cls.from_dict(fields)

    title = f'`model`, with `model.kind="{kind}"`'
    return Section("model", cls, default_model(kind), check, title)


def comments(cls: type) -> dict[str, str]:
    """{field: what its comment, or its line under `Attributes:` in the docstring, says}."""
    found: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if dataclasses.is_dataclass(parent):
            found |= _attributes(parent.__doc__ or "") | _comments(inspect.getsource(parent))
    return found


def _attributes(docstring: str) -> dict[str, str]:
    _, _, listed = inspect.cleandoc(docstring).partition("Attributes:\n")
    text = inspect.cleandoc(listed)
    entries = re.findall(r"^(\w+(?:, \w+)*): (.*(?:\n +.*)*)", text, re.M)
    return {name: " ".join(says.split()) for names, says in entries for name in names.split(", ")}


def _comments(source: str) -> dict[str, str]:
    lines = source.splitlines()
    notes = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while first - 1 in notes and lines[first - 2].lstrip().startswith("#"):
                first -= 1
            said = [notes[line] for line in range(first, node.end_lineno + 1) if line in notes]
            if said:
                found[node.target.id] = " ".join(said)
    return found


def allowed(section: Section, field: str) -> str:
    """What values the field takes, as the errors for wrong ones say."""
    said = []
    for value in NOT_ALLOWED:
        try:
            section.check({field: value})
        except (ValueError, TypeError, OSError, OverflowError) as error:
            subject, _, rest = str(error).partition(": ")
            if re.match(rf"({section.name}\.)?{field}=[^=]*$", subject):
                names = re.search(r"; one of (.*)$", rest)
                if names:
                    return ", ".join(f"`{name}`" for name in names[1].split(", "))
                if rest.startswith("must be at least") or rest.startswith("must lie"):
                    said.append(re.sub(r"^must (be |lie )", "", rest))
    return said[0] if said else ""


def _code(value: Any) -> str:
    text = repr(value)
    return f"`{text}`" if text != "''" else '`""`'


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(section: Section, model_differs: Mapping[str, Any]) -> list[str]:
    kinds, says = (
        {f.name: str(f.type) for f in dataclasses.fields(section.cls)},
        {
            "kind": "name of the network: a UNet or Stable Diffusion 3's transformer",
            "pretrained": "pipeline, a folder or single file, whose network a new run starts from",
            **comments(section.cls),
        },
    )
    rows = ["| field | default | allowed | meaning |", "|---|---|---|---|"]
    for field, value in section.defaults.items():
        if field not in says:
            raise ValueError(f"{section.cls.__name__}.{field}: has no comment; write one")
        takes = allowed(section, field) or ""
        kind = kinds.get(field, "str").replace(" | None", " or None")
        if names := TABLES.get(f"{section.name}.{field}"):
            takes = ", ".join(f"`{name}`" for name in names)
        default = _code(value)
        if field in model_differs:
            default += f"; in `configs/base.py` {_code(model_differs[field])}"
        takes = takes if takes.startswith("`") else ", ".join(filter(None, (f"`{kind}`", takes)))
        name = f"`{section.name}.{field}`"
        rows.append("| " + " | ".join(map(_cell, (name, default, takes, says[field]))) + " |")
    return rows


def _introduction(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").partition("Attributes:")[0].strip()


def config_page() -> str:
    """Every field of every config, with default, allowed values and meaning."""
    page = [
        "# Fields of a config",
        "",
        "A field is set on the command line, by `--config.SECTION.FIELD=VALUE`, or in a config",
        "file of your own ([recipe](../extending.md#a-config)). Beside sections there is `seed`.",
        "Fields that follow from others are not set:",
        ", ".join(f"`{name}.{f}`" for name, fields in DERIVED.items() for f in fields) + ".",
    ]
    small = base.get_config()["model"].to_dict()
    for section in sections():
        usual = section.name == "model" and section.defaults["kind"] == "unet"
        differs = {k: v for k, v in small.items() if v != section.defaults.get(k)} if usual else {}
        page += ["", f"## {section.title or f'`{section.name}`'}", ""]
        page += [_introduction(section.cls), "", *_table(section, differs)]
        if section.name == "mesh":
            page += ["", "Rules by name: [scaling](../scaling.md#how-a-parameter-gets-its-place)."]
    return "\n".join(page) + "\n"


def commands() -> dict[str, pathlib.Path]:
    """{command: its file}, all that the package has."""
    files = sorted((ROOT / "contextdiff_jax").glob("*.py"))
    runs = re.compile(r"^    cli\.run\(", re.M)
    return {file.stem: file for file in files if runs.search(file.read_text())}


def _flag_rows(file: pathlib.Path) -> list[str]:
    rows = ["| flag | default | takes | meaning |", "|---|---|---|---|"]
    with flags_of(file) as defined:
        for flag in itertools.chain(*defined.flags_by_module_dict().values()):
            kind = flag.flag_type()
            takes = "; ".join(filter(None, (kind, str(flag.parser.syntactic_help or ""))))
            if flag.name == "config":
                takes = "a config file; [its fields](config.md)"
            default = "" if flag.default in (None, []) else _code(flag.default)
            says = flag.help.replace(";\n    repeat this option to specify a list of values", "")
            rows.append("| " + " | ".join(map(_cell, (f"`--{flag.name}`", default, takes, says))))
            rows[-1] += " |"
    return rows


def commands_page() -> str:
    """Every command with what it says of itself and its flags, and every script of launch/."""
    page = [
        "# Commands",
        "",
        "Each is started as `python -m contextdiff_jax.NAME`; `--help` prints the same. A mistake",
        "is one line on stderr and exit status 2.",
    ]
    for name, file in commands().items():
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        page += ["", f"## {name}", "", "```text", docstring, "```", "", *_flag_rows(file)]
    page += ["", "## Scripts", ""]
    for script in sorted((ROOT / "launch").glob("*.sh")):
        head = re.match(r"(?:#!.*\n)?((?:#.*\n)+)", script.read_text())[1]
        page += [f"### {script.name}", "", "```text", re.sub(r"^# ?", "", head, flags=re.M) + "```"]
        page += [""]
    return "\n".join(page) + "\n"


# Pages of the package's functions and classes: title, its room, and what is on it, in the order of
# reading (none: a module with all that it defines).
ROOMS = {
    "pipeline": ("Pipeline", "inference", ("pipeline.Pipeline", "request.Request")),
    "diffusion": (
        "The mathematics",
        "diffusion",
        ("schedule", "paths", "process", "protocols", "samplers", "solvers", "grids", "guidance")
        + ("inversion", "losses", "likelihood", "optimised"),
    ),
    "models": (
        "Networks",
        "models",
        ("contextdiff", "denoising", "context", "context_kinds", "unet", "mmdit", "text", "clip")
        + ("t5", "vae", "video", "video_mmdit", "lora", "precision"),
    ),
    "data": ("Data", "data", ("", "records", "loader", "tokenizer", "video")),
    "pretrained": (
        "Pretrained folders",
        "pretrained",
        ("unet", "mmdit", "vae", "clip", "t5", "pipeline", "lora", "conversion", "kinds"),
    ),
    "training": ("Training", "training", ("loop", "run_steps", "step", "objective", "state")),
    "runs": ("Runs", "runs", ("reading", "model", "checkpoints", "averages", "workdir")),
    "evaluation": ("Evaluation", "evaluation", ("metrics", "subject", "distances", "intervals")),
    "editing": (
        "Editing",
        "editing",
        ("end_to_end", "tuning", "inversion", "edits", "attention", "video_model"),
    ),
    "parallel": ("Devices", "parallel", ("mesh", "processes", "chips")),
    "settings": ("Settings", "settings", ("", "process", "sampling", "train")),
}


def room_page(title: str, room: str, modules: tuple[str, ...]) -> str:
    """A page that mkdocstrings fills in."""
    page = [f"# {title}", "", f"`contextdiff_jax.{room}`"]
    for module in modules:
        page += ["", f"::: {'.'.join(filter(None, ('contextdiff_jax', room, module)))}"]
    return "\n".join(page) + "\n"


def pages() -> dict[str, str]:
    """{path in the site: text} of all pages of the reference."""
    rooms = {f"reference/{name}.md": room_page(*room) for name, room in ROOMS.items()}
    return {
        "reference/config.md": config_page(),
        "reference/commands.md": commands_page(),
        **{path.replace("reference/", "reference/api/"): text for path, text in rooms.items()},
    }


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        print(*pages().values(), sep="\n")
