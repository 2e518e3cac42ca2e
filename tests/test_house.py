"""The order of the rooms: who may import whom, read from the imports themselves."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "contextdiff_jax"
# From the ground up. A room imports from the floors below its own: neither from above nor from
# its own floor's other rooms. The modules beside the rooms that have no row, and the package
# itself, are the top: commands and the public door.
FLOORS = (
    ("runtime", "configs"),
    ("diffusion",),
    ("parallel",),
    ("models",),
    ("data",),
    ("pretrained",),
    ("settings",),
    ("runs",),
    ("inference",),
    ("training",),
    ("evaluation",),
    ("editing",),
    ("experiments", "benchmarks", "demo_page"),
    ("cli",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
EXCEPTIONS = {
    ("pretrained.pipeline", "inference.opening"): "load_pipeline is the first edition's name for "
    "opening a folder, where scripts look for it; imported when it is called",
}
# The standard library's modules that neither read nor write anything.
PURE = {
    *(
        "__future__",
        "collections",
        "contextlib",
        "dataclasses",
        "difflib",
        "inspect",
        "enum",
        "functools",
    ),
    *("itertools", "math", "operator", "types", "typing"),
}
NETWORKS = {"flax", "optax", "orbax", "torch"}


def module_name(file: pathlib.Path) -> str:
    """`training.loop`; a room's `__init__` is the room, the package's own ''."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def statements(node: ast.AST, inside: bool) -> Iterator[ast.stmt]:
    """The imports below `node`, those of functions only if `inside`; none that only a type checker
    sees.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from statements(ast.Module(child.orelse, []), inside)
        elif inside or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from statements(child, inside)


def imports(name: str, inside: bool = True) -> tuple[set[str], set[str]]:
    """(modules of the package, outside packages) that the module imports."""
    house, outside = set(), set()
    for node in statements(ast.parse(FILES[name].read_text()), inside):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{name}: imports are written from the package's name on"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        for path in found:
            package, _, rest = path.partition(".")
            if package != "contextdiff_jax":
                outside.add(package)
            else:  # a module, or a name in one
                house.add(rest if rest in FILES else rest.rpartition(".")[0])
    return house, outside


def reached(names: set[str], inside: bool = True) -> set[str]:
    """The modules `names`, all that they import, and so on; their rooms' `__init__` too."""
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        rooms = {name.rpartition(".")[0]} - {""}
        waiting |= (imports(name, inside)[0] | rooms) - found
    return found


def outsiders(names: set[str], inside: bool = True) -> set[str]:
    """The outside packages that the modules import, and all those that they reach."""
    return set().union(*(imports(name, inside)[1] for name in reached(names, inside)))


def of_room(room: str) -> set[str]:
    return {name for name in FILES if name.partition(".")[0] == room}


def test_every_room_has_a_floor():
    rooms = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert rooms <= FLOOR_OF.keys() <= rooms | {"configs", "cli"}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downward(name):
    room = name.partition(".")[0]
    for other in sorted(imports(name)[0]):
        above = other.partition(".")[0]
        floors = [FLOOR_OF.get(which, len(FLOORS)) for which in (above, room)]
        if above != room and (name, other) not in EXCEPTIONS:
            assert floors[0] < floors[1], f"{name} imports {other}, which isn't below it"


def test_exceptions_are_needed():
    for name, other in EXCEPTIONS:
        assert other in imports(name)[0] and other not in imports(name, inside=False)[0]


def test_the_mathematics_knows_jax_alone():
    """No networks, no configs, no files."""
    allowed = {"jax", "jaxtyping", "numpy", "chex", "einops"}
    assert outsiders(of_room("diffusion")) <= PURE | allowed


def test_data_is_numpy_alone():
    assert not outsiders(of_room("data")) & ({"jax"} | NETWORKS)


def test_commands_read_their_flags_before_jax_starts():
    commands = {name for name in FILES if "." not in name} - FLOOR_OF.keys()
    assert {"", "train", "sample", "edit", "evaluate", "cache_latents"} <= commands
    assert not outsiders(commands, inside=False) & ({"jax"} | NETWORKS)
