"""The house rules that a machine can check."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "upop"
# Which rooms a room may use; what is not listed here (errors, files, settings) serves all but the method.
ALLOWED = {
    "pruning": set(),
    "tokens": {"pruning"},
    "models": {"pruning", "tokens"},
    "data": {"pruning"},
    "checkpoints": {"pruning", "models", "tokens"},
    "report": {"pruning"},
    "metrics": {"data"},
    "integrations": {"pruning", "checkpoints"},
    "runs": {"pruning", "tokens", "models", "data", "checkpoints", "report"},
    "tasks": {"pruning", "models", "data", "checkpoints", "report", "metrics", "runs"},
    "demo": {"data"},
    "cli": {"pruning", "models", "data", "checkpoints", "report", "metrics", "runs", "tasks", "demo"},
}


def imported(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return {name for name in names if name.split(".")[0] == "upop"}


def test_arrows_point_one_way() -> None:
    wrong = []
    for room, allowed in ALLOWED.items():
        for file in (SOURCE / room).rglob("*.py"):
            for name in imported(file):
                target = [*name.split("."), ""][1]
                if room == "pruning" and target != "pruning":
                    wrong.append(f"{file.name} imports {name}")
                elif target in ALLOWED and target not in allowed | {room}:
                    wrong.append(f"{file.relative_to(SOURCE)} imports {name}")
    assert not wrong


# The rooms of checkpoints/, from the ground up, each named by its folder; those last take opened checkpoints.
FLOORS = ("files", "fitting", "names", "libraries", "configs", "saving", "published", "formats", "", "export")


def test_floors_of_checkpoints() -> None:
    """A room of checkpoints/ imports those below it; modules beside the rooms take what `open_checkpoint` returns."""
    wrong = []
    for file in (SOURCE / "checkpoints").rglob("*.py"):
        place = file.relative_to(SOURCE / "checkpoints")
        floor = _floor(place.parts[0] if len(place.parts) > 1 else "")
        for statement in ast.parse(file.read_text()).body:
            for node in () if _of_types(statement) else ast.walk(statement):
                module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
                if module.startswith("upop.checkpoints.") and _floor(module.split(".")[2]) > floor:
                    wrong.append(f"{place} imports {module}")
    assert not wrong


def _floor(room: str) -> int:
    return FLOORS.index(room if room in FLOORS else "")


def test_the_demo_is_imported_by_commands_alone_when_they_run() -> None:
    wrong = []
    for file in SOURCE.rglob("*.py"):
        name = file.relative_to(SOURCE)
        if name.parts[0] == "demo":
            continue
        tree = ast.parse(file.read_text())
        on_import = tree.body if name.parts[0] == "cli" else [tree]
        for statement in on_import:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef) or _of_types(statement):
                continue
            for node in ast.walk(statement):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if any(f"{module}.".startswith("upop.demo.") for module in modules):
                    wrong.append(f"{name}:{node.lineno}")
    assert not wrong


def _of_types(statement: ast.AST) -> bool:
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING"


# Where bytes are parsed that others may have written: each within bounds of its own.
READERS = {
    "json": {"pruning/json_text.py", "runs/lock.py"},
    "own json": {  # what upop wrote itself
        "checkpoints/files/weights.py",
        "checkpoints/libraries/open_clip_models.py",
        "checkpoints/saving/folder.py",
    },
    "yaml": {"yaml_files.py"},
    "Image": {"data/images.py", "report/page.py"},
}
CALLS = {"json": ("json", "load", "loads"), "yaml": ("yaml", "load", "safe_load"), "Image": ("Image", "open")}


def test_files_are_read_by_the_bounded_readers() -> None:
    wrong = []
    for file in SOURCE.rglob("*.py"):
        name = str(file.relative_to(SOURCE))
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        for kind, (module, *functions) in CALLS.items():
            found = [call for call in calls if isinstance(call, ast.Attribute) and call.attr in functions]
            found = [call for call in found if isinstance(call.value, ast.Name) and call.value.id == module]
            if found and name not in READERS[kind] | (READERS["own json"] if kind == "json" else set()):
                wrong.append(f"{name}:{found[0].lineno}")
    assert not wrong
