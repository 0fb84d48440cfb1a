"""Who imports whom: the layers stated in pyproject.toml hold, and no imports run in a circle.

import-linter holds the same layers. This test names each import that breaks one, and finds circles of modules and of
rooms. A room is a package or module directly in `ppsim` or `ppexec`. Imports inside functions count; imports for type
checkers alone do not.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import resolve_name
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ppexec
import ppsim

ROOT = Path(__file__).parents[1]
PACKAGES = ["ppsim", "ppexec", "studies"]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
LAYERS = [contract for contract in CONTRACTS if contract["type"] == "layers"]


class Import(NamedTuple):
    importer: str
    imported: str


def _modules() -> dict[str, Path]:
    """Every module of the project by its name; a package is its `__init__`."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements at any depth, but not those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield from _statements(ast.Module([other], []))
        else:
            yield from _statements(node)


def _targets(statement: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
    """What a statement may import: modules, or names in a module."""
    for alias in statement.names:
        if isinstance(statement, ast.Import):
            yield alias.name
        else:
            yield f"{resolve_name('.' * statement.level + (statement.module or ''), package)}.{alias.name}"


def read_imports() -> list[Import]:
    """Imports among the project's own modules."""
    modules = _modules()
    found = []
    for importer, path in modules.items():
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        for statement in _statements(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(statement, package):
                module = target if target in modules else target.rpartition(".")[0]
                if module in modules and module != importer:
                    found.append(Import(importer, module))
    return found


def room_of(module: str, container: str) -> str | None:
    """The room of `container` that holds a module; "" is the container's own `__init__`, None is outside."""
    if module == container:
        return ""
    return module.removeprefix(f"{container}.").split(".")[0] if module.startswith(f"{container}.") else None


def places_of(contract: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """For each room of a contract: how far down it stands, and whether it may import rooms beside it."""
    found = {}
    for depth, layer in enumerate(contract["layers"]):
        for room in layer.replace("|", " ").replace(":", " ").split():
            found[room.strip("()")] = (depth, ":" in layer)
    return found


def upward(imports: Iterable[Import], contract: Mapping[str, Any]) -> list[str]:
    """The imports that break a contract."""
    places, broken = places_of(contract), []
    for importer, imported in imports:
        if "containers" in contract:
            [container] = contract["containers"]
            first, second = room_of(importer, container), room_of(imported, container)
        else:
            first, second = importer.split(".")[0], imported.split(".")[0]
        if first not in places or second not in places or first == second:
            continue
        (from_depth, may_import_beside), (to_depth, _) = places[first], places[second]
        if to_depth < from_depth or (to_depth == from_depth and not may_import_beside):
            broken.append(f"{importer} imports {imported}")
    return broken


def circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The largest sets of nodes that all reach one another (Tarjan's algorithm)."""
    targets: dict[str, list[str]] = {}
    for source, target in arrows:
        targets.setdefault(source, []).append(target)
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        path.append(node)
        for target in targets.get(node, []):
            if target not in order:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in path:
                lowest[node] = min(lowest[node], order[target])
        if lowest[node] == order[node]:
            members = path[path.index(node) :]
            del path[path.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in list(targets):
        if node not in order:
            visit(node)
    return found


@pytest.mark.parametrize("contract", LAYERS, ids=lambda contract: contract["id"])
def test_imports_go_down(contract: Mapping[str, Any]) -> None:
    assert upward(read_imports(), contract) == []


@pytest.mark.parametrize("contract", LAYERS, ids=lambda contract: contract["id"])
def test_every_room_has_a_layer(contract: Mapping[str, Any]) -> None:
    rooms = set(PACKAGES)
    for container in contract.get("containers", []):
        rooms = {str(room_of(module, container)) for module in _modules() if room_of(module, container)}
    assert rooms - set(places_of(contract)) == set()


def test_no_circle_of_modules() -> None:
    assert circles(read_imports()) == []


@pytest.mark.parametrize("package", ["ppsim", "ppexec"])
def test_no_circle_of_rooms(package: str) -> None:
    rooms = [(room_of(importer, package), room_of(imported, package)) for importer, imported in read_imports()]
    assert circles((first, second) for first, second in rooms if first and second and first != second) == []


def test_no_public_name_is_also_a_module() -> None:
    """Cause: `ppsim.search` was a function that hid a package, so that `ppsim.search.problem` was there or not."""
    for package in (ppsim, ppexec):
        hidden = [name for name in package.__all__ if f"{package.__name__}.{name}" in _modules()]
        assert hidden == []


def test_imports_of_every_kind_are_read() -> None:
    source = """
import ppsim.a
from ppsim import b
from . import c
from ..d import name
def function():
    from ppsim.e import name
if TYPE_CHECKING:
    from ppsim.f import name
else:
    import ppsim.g
"""
    found = [target for each in _statements(ast.parse(source)) for target in _targets(each, "ppsim.room")]
    assert found == ["ppsim.a", "ppsim.b", "ppsim.room.c", "ppsim.d.name", "ppsim.e.name", "ppsim.g"]


def test_broken_layers_and_circles_are_found() -> None:
    contract = {"containers": ["p"], "layers": ["top", "left | right", "one : two"]}
    down = [Import("p.top", "p.one.x"), Import("p.left.x", "p.left.y"), Import("p.one", "p.two"), Import("p", "p.top")]
    assert upward(down, contract) == []
    assert upward([Import("p.left.x", "p.right")], contract) == ["p.left.x imports p.right"]
    assert upward([Import("p.two", "p.top.x")], contract) == ["p.two imports p.top.x"]
    assert circles(["ab", "bc", "cd", "db", "ea"]) == [["b", "c", "d"]]
    assert circles(["ab", "bc", "ac"]) == []
