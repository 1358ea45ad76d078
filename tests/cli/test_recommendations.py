"""What messages and help tell one to type exists: commands, flags, settings, functions, modules and packages."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import upop
from documents import ROOT
from upop.cli import published_crossget, published_deit, published_segmenter
from upop.cli.app import app
from upop.cli.published import blip_command
from upop.tasks import TASKS

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LAUNCHER = {"--nproc_per_node", "--standalone", "--nnodes", "--trust-remote-code", "--trust_remote_code"}
"""Flags of torchrun, of servers of models, and of lm-eval."""
PUBLISHED = {
    "--backbone",
    "--dataset",
    "--decoder",
    "--dist-eval",
    "--log-dir",
    "--no-resume",
    "--singlescale",
}
"""Flags that the published commands alone have, as recipes print them; test_recipes runs these."""
_HOLE = "\0"
"""Stands for what an f-string fills in."""
_COMMANDS = (
    re.compile(r"`(?:python -m )?upop((?: [^`]*)?)`"),
    re.compile(r"Example: (?:python -m )?upop ([^\n]+)"),
    re.compile(r"(?<![`\w./-])upop ((?:[a-z]+ ){1,2}(?:[^\s.;:]+ )*?--[^\n;)`]*)"),
)
_FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
_SETTING = re.compile(r"--set ([a-z]\w*)=")
_FUNCTION = re.compile(r"\bupop((?:\.\w+)+)\(([^()]*)")
_MODULE = re.compile(r"python -m ([\w.]+\w)")
_PACKAGE = re.compile(r"pip install ([\w.\[\]'\"-]+)")


def messages(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the texts of a module that are no docstrings, with their lines; what is filled in is a hole."""
    tree = ast.parse(file.read_text())
    parts = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
    described = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
    }  # what stands alone is no message
    passed_over = parts | described
    for node in ast.walk(tree):
        if id(node) in passed_over:
            continue
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(
                    part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else _HOLE
                    for part in node.values
                ),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def options(command: Any) -> set[str]:
    """Return the flags of a command and of those below it."""
    own = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options(other) for other in getattr(command, "commands", {}).values())) | {"--help"}


ROOT_COMMAND: Any = typer.main.get_command(app)
BLIP_COMMAND: Any = typer.main.get_command(blip_command("nlvr", "configs/nlvr.yaml"))
KNOWN = options(ROOT_COMMAND).union(
    options(BLIP_COMMAND),
    *(
        options(typer.main.get_command(module.app))
        for module in (published_crossget, published_deit, published_segmenter)
    ),
)
SETTINGS = {name for task in TASKS.values() for name in task.settings.model_fields}


def command_problems(words: list[str]) -> Iterator[str]:
    command, used = ROOT_COMMAND, ["upop"]
    while getattr(command, "commands", None) and words and not words[0].startswith(("-", _HOLE)):
        used.append(words.pop(0))
        if used[-1] not in command.commands:
            yield f"no command {' '.join(used)}"
            return
        command = command.commands[used[-1]]
    for flag in _FLAG.findall(" ".join(words)):
        if flag not in options(command):
            yield f"{' '.join(used)} has no {flag}"
    arguments = [parameter.name for parameter in command.params if parameter.param_type_name == "argument"]
    if "task" in arguments and words and words[0].isascii() and words[0].islower() and words[0] not in TASKS:
        yield f"no task {words[0]}"


def function_problems(path: str, arguments: str) -> Iterator[str]:
    found: Any = upop
    for name in path.strip(".").split("."):
        if not hasattr(found, name):
            try:
                importlib.import_module(f"{found.__name__}.{name}")
            except (ImportError, AttributeError):
                yield f"no upop{path}"
                return
        found = getattr(found, name)
    parameters = inspect.signature(found).parameters
    for name in re.findall(r"(\w+)=", arguments):
        if name not in parameters:
            yield f"upop{path} takes no {name}"


def module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return any(name.split(".")[0] in required for required in requirements())


def requirements() -> list[str]:
    return [*PROJECT["dependencies"], *(name for extra in PROJECT["optional-dependencies"].values() for name in extra)]


def package_problems(package: str) -> Iterator[str]:
    name, _, extra = package.strip("'\".").rstrip("]").partition("[")
    if name == "upop":
        if extra and extra not in PROJECT["optional-dependencies"]:
            yield f"no extra {extra}"
    elif not any(re.match(rf"{re.escape(name)}\b", required) for required in requirements()):
        yield f"{name} is in no list of requirements"


def problems(text: str) -> list[str]:
    """Return what a message recommends that does not exist."""
    found = [
        problem
        for pattern in _COMMANDS
        for match in pattern.finditer(text)
        for problem in command_problems(match[1].split())
    ]
    found += [f"no flag {flag}" for flag in _FLAG.findall(text) if flag not in KNOWN | LAUNCHER | PUBLISHED]
    found += [f"no setting {name}" for name in _SETTING.findall(text) if name not in SETTINGS]
    found += [problem for match in _FUNCTION.finditer(text) for problem in function_problems(match[1], match[2])]
    found += [f"no module {name}" for name in _MODULE.findall(text) if not module_exists(name)]
    return found + [problem for name in _PACKAGE.findall(text) for problem in package_problems(name)]


SOURCES = sorted((ROOT / "src" / "upop").rglob("*.py"))


def test_what_messages_recommend_exists() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {problem}"
        for file in SOURCES
        for line, text in messages(file)
        for problem in problems(text)
    ]
    assert not wrong, "\n".join(wrong)


def test_recommendations_are_found() -> None:
    texts = "\n".join(text for file in SOURCES for _, text in messages(file))
    for pattern, at_least in [
        *zip(_COMMANDS, (5, 2, 1), strict=True),
        (_FLAG, 80),
        (_SETTING, 2),
        (_FUNCTION, 8),
        (_MODULE, 2),
        (_PACKAGE, 3),
    ]:
        assert len(pattern.findall(texts)) >= at_least, pattern


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Run `upop compres nlvr`.", "no command upop compres"),
        ("Run `upop data shape`.", "no command upop data shape"),
        ("Example: upop train nlvr --ratio 0.5", "upop train has no --ratio"),
        ("Make it anew (upop data shapes --tasks nlvr).", "upop data shapes has no --tasks"),
        ("Run `upop train nlvr2 --epochs 3`.", "no task nlvr2"),
        ("Leave --rank out.", "no flag --rank"),
        ("Add --set image_sise=64.", "no setting image_sise"),
        ("Use upop.lode(path).", "no upop.lode"),
        ("Use upop.load(path, strikt=False).", "upop.load takes no strikt"),
        ("python -m upop.cli.apps", "no module upop.cli.apps"),
        ("pip install 'upop[cocoa]'.", "no extra cocoa"),
        ("pip install timmm", "timmm is in no list"),
    ],
)
def test_what_does_not_exist_is_noticed(text: str, problem: str) -> None:
    assert any(problem in found for found in problems(text))
