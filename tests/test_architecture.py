"""The house in order: arrows run downwards, the lower floors know no torch, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import paci

ROOT = Path(paci.__file__).parent

# From bottom to top: what each layer may import, besides itself. A layer that is not here has no
# place in the house yet: give it one.
_TRAINED = {"errors", "families", "schedule", "trace", "plan", "runtime", "optim"}
_ALL = _TRAINED | {"models", "data", "view", "train", "bench"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "families": {"errors"},
    "schedule": {"errors", "families"},
    "trace": {"errors", "schedule"},
    "plan": {"errors", "families", "schedule", "trace"},
    "optim": {"errors", "families", "schedule"},
    "runtime": {"errors", "families", "schedule", "trace", "plan", "optim"},
    "models": {"errors", "plan"},
    "data": {"errors"},
    "view": {"errors", "schedule", "trace"},
    # The public surface: names that are imported when first used. For those who use the rest.
    "__init__": _TRAINED,
    "train": _ALL - {"train", "bench"} | {"__init__"},
    "bench": _ALL - {"bench"} | {"__init__"},
    "cli": _ALL | {"__init__"},
    "__main__": {"cli"},
}
WITHOUT_TORCH = ("errors", "families", "schedule", "trace", "plan", "view")
LOADED_ON_DEMAND = {"paci.plan.torch_schedules"}  # on a lower floor, and about torch itself
# The rooms of paci/runtime, from bottom to top: each may import those before it. Files beside them
# are the pipeline itself, and may import all.
ROOMS = ("transport", "weights", "stage", "observation", "")
MOST_LINES = 450


def modules_of(root: Path) -> dict[str, Path]:
    """Files by dotted name, ``paci.runtime.stage``; a folder's ``__init__`` by the folder's."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, is_package: bool, source: str) -> list[str]:
    """Dotted names that a module imports, wherever in the file; ``from a import b`` gives
    ``a.b``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


def graph_of(sources: Mapping[str, tuple[bool, str]]) -> dict[str, set[str]]:
    """Which of the modules imports which; a name inside a module counts as the module."""
    graph: dict[str, set[str]] = {}
    for module, (is_package, source) in sources.items():
        graph[module] = set()
        for name in imports_of(module, is_package, source):
            while name and name not in sources:
                name = name.rpartition(".")[0]
            if name:
                graph[module].add(name)
    return graph


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def upward_arrows(graph: Mapping[str, Iterable[str]], allowed: Mapping[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if layer_of(module) != layer_of(other)
        and layer_of(other) not in allowed.get(layer_of(module), set())
    ]


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Modules that import each other in a ring, if any do."""
    done: set[str] = set()

    def walk(path: list[str]) -> list[str]:
        for other in sorted(graph[path[-1]]):
            if other in path:
                return [*path[path.index(other) :], other]
            if other not in done and (found := walk([*path, other])):
                return found
        done.add(path[-1])
        return []

    for module in sorted(graph):
        if module not in done and (found := walk([module])):
            return found
    return []


def sources() -> dict[str, tuple[bool, str]]:
    return {
        module: (path.name == "__init__.py", path.read_text(encoding="utf-8"))
        for module, path in modules_of(ROOT).items()
    }


# --- the house ------------------------------------------------------------------------------


def test_every_layer_has_its_place():
    assert {layer_of(module) for module in sources()} <= ALLOWED.keys()
    assert {"errors", "schedule", "trace", "runtime"} <= {layer_of(m) for m in sources()}


def test_arrows_run_downwards():
    assert upward_arrows(graph_of(sources()), ALLOWED) == []


def room_of(module: str) -> str:
    room = module.removeprefix("paci.runtime.").partition(".")[0]
    return room if room in ROOMS else ""


def test_rooms_of_the_runtime_import_those_below_them():
    for module, others in graph_of(sources()).items():
        for other in others:
            if layer_of(module) == layer_of(other) == "runtime":
                rooms = ROOMS.index(room_of(module)), ROOMS.index(room_of(other))
                assert rooms[0] >= rooms[1], f"{module} imports {other}"


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in ROOT.rglob("*.py") if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []
    assert not {f"_{name}" for name in names} & names.keys()


def test_the_plan_of_the_house_has_no_stairs_that_lead_back():
    assert circle(ALLOWED) == []


def test_there_is_no_circle():
    assert circle(graph_of(sources())) == []


def test_nobody_imports_the_command_line():
    importers = {
        layer_of(module)
        for module, others in graph_of(sources()).items()
        for other in others
        if layer_of(other) == "cli"
    }
    assert importers <= {"cli", "__main__"}


def test_the_lower_floors_know_no_torch():
    for module, (is_package, source) in sources().items():
        if layer_of(module) in WITHOUT_TORCH and module not in LOADED_ON_DEMAND:
            names = imports_of(module, is_package, source)
            assert not [name for name in names if name.split(".")[0] == "torch"], module


@pytest.mark.parametrize("floor", WITHOUT_TORCH)
def test_the_lower_floors_load_no_torch(floor: str):
    modules = [m for m in modules_of(ROOT) if layer_of(m) == floor and m not in LOADED_ON_DEMAND]
    if not modules:
        pytest.skip(f"no paci.{floor} yet")
    code = f"import {', '.join(modules)}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", modules_of(ROOT))
def test_a_file_says_what_it_is_and_stays_short(module: str):
    source = modules_of(ROOT)[module].read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring, f"{module} needs a docstring"
    assert docstring.splitlines()[0].strip()
    num_lines = len(source.splitlines())
    assert num_lines <= MOST_LINES, f"{module} has {num_lines} lines; make two files of it"


# --- the inspector, inspected ---------------------------------------------------------------


def house(**files: str) -> dict[str, tuple[bool, str]]:
    made = {f"paci.{name.replace('__', '.')}": (False, text) for name, text in files.items()}
    folders = {name.rpartition(".")[0] for name in made}
    return dict.fromkeys({"paci", *folders}, (True, "")) | made


@pytest.mark.parametrize(
    "line",
    [
        "from paci.runtime.stage import Stage",
        "from paci.runtime import stage",
        "from paci import runtime",
        "import paci.runtime.stage as s",
        "from ..runtime.stage import Stage",
        "from .. import runtime",
        "def f():\n    import paci.runtime.stage",
        "if TYPE_CHECKING:\n    from paci.runtime.stage import Stage",
        "from paci import PACI",
    ],
)
def test_an_arrow_upwards_is_found(line: str):
    graph = graph_of(house(schedule__check=line, runtime__stage=""))
    (found,) = upward_arrows(graph, ALLOWED)
    assert found.startswith("paci.schedule.check imports paci")


@pytest.mark.parametrize(
    "line",
    [
        "from paci.schedule.check import check",
        "from paci.runtime.loss import Loss",
        "from .loss import Loss",
        "from . import loss",
        "from ..schedule.check import check",
        "import torch.nn",
        "from torch import nn",
        "from pacified.train import loop",
    ],
)
def test_an_arrow_downwards_is_not(line: str):
    graph = graph_of(house(runtime__stage=line, runtime__loss="", schedule__check=""))
    assert upward_arrows(graph, ALLOWED) == []
    assert circle(graph) == []


def test_a_new_layer_has_no_rights():
    graph = graph_of(house(attic__box="from paci.errors import PaciError", errors=""))
    assert upward_arrows(graph, ALLOWED) == ["paci.attic.box imports paci.errors"]


def test_a_circle_is_found():
    graph = graph_of(
        house(
            runtime__a="from paci.runtime import b",
            runtime__b="from paci.runtime.c import C",
            runtime__c="def f():\n    from . import a",
            runtime__d="from paci.runtime.a import A",
        )
    )
    assert circle(graph) == ["paci.runtime.a", "paci.runtime.b", "paci.runtime.c", "paci.runtime.a"]
    assert upward_arrows(graph, ALLOWED) == []


def test_relative_names_are_resolved():
    line = "from . import a\nfrom .b import c\nfrom .. import d\nfrom ..e.f import g\nimport h.i"
    expected = ["paci.x.a", "paci.x.b.c", "paci.d", "paci.e.f.g", "h.i"]
    assert imports_of("paci.x.y", False, line) == expected
    assert imports_of("paci.x", True, line) == expected
