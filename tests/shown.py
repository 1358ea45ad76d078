"""Commands as people type them: each is given to the very parser that would read it, and nothing is run."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
import tomllib
from pathlib import Path
from unittest import mock

import typer
from typer.main import get_command

from documents import ROOT, words
from upop.cli import published_crossget, published_deit, published_segmenter
from upop.cli.app import app
from upop.cli.arguments import with_resume_value
from upop.cli.published import blip_command

OTHER_FLAGS = {
    "compress_deit.py": published_deit.app,
    "compress_segmenter.py": published_segmenter.app,
    "train_retrieval_clip.py": published_crossget.app,
}
"""The published scripts whose flags are not BLIP's."""
LAUNCHERS = ("-m torch.distributed.run", "torchrun")


def check(line: str) -> None:
    """Fail unless a command line is one that would be understood."""
    parts = words(line)
    while parts and re.fullmatch(r"[A-Z_]+=\S*", parts[0]):
        parts = parts[1:]
    if parts[0] == "srun":  # which starts what follows on every machine
        parts = parts[1:]
    match parts:
        case ["upop", *rest]:
            parse(app, rest)
        case ["python", "-m", "torch.distributed.run", *rest] | ["torchrun", *rest]:
            _check_launched(rest)
        case ["python", script, *rest] if script.startswith("compress_") or script in OTHER_FLAGS:
            check_published(script, rest)
        case ["python", "-c", code]:
            exec(compile(code, "shown", "exec"), {})
        case ["python", script] if script.startswith("tests/"):
            assert (ROOT / script).is_file()
        case ["python", script, *rest] if script.endswith(".py"):
            _check_script(ROOT / script, rest)
        case ["python", "-m", module, *_]:
            assert list((ROOT / "tests").glob(module.replace(".", "/") + ".py")), f"no module {module}"
        case ["make", target]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        case ["pip", "install", "-e", extra]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            names = re.findall(r"[\w-]+", extra.removeprefix("."))
            assert set(names) <= set(project["optional-dependencies"])
        case ["tensorboard", "--logdir", folder]:
            assert folder.startswith("output/")  # where the commands beside it write
        case _:
            raise AssertionError(f"no test knows how to read {line!r}")


def parse(command: typer.Typer, rest: list[str]) -> None:
    """Give words to a command of ours, without running it."""
    node, name, rest = get_command(command), "command", with_resume_value(rest)
    while hasattr(node, "commands") and node.commands:
        name, *rest = rest
        node = node.commands[name]
    node.make_context(name, rest)


def check_published(script: str, rest: list[str]) -> None:
    """Give words to a published script's command."""
    assert (ROOT / script).is_file()
    task = script.removeprefix("compress_").removesuffix(".py")
    parse(OTHER_FLAGS.get(script) or blip_command(task, f"./configs/{task}.yaml"), rest)


def _check_launched(rest: list[str]) -> None:
    """Give words to torch's launcher, and what it would start to ours."""
    from torch.distributed.run import get_args_parser

    known = get_args_parser().parse_args(rest)
    if known.module:
        assert known.training_script == "upop"
        parse(app, known.training_script_args)
    else:
        check_published(known.training_script, known.training_script_args)


class _Parsed(Exception):  # noqa: N818 - no error: it ends a script that has read its words
    pass


def _check_script(script: Path, rest: list[str]) -> None:
    """Run a script up to where it has read its command line."""
    assert script.is_file(), f"no {script}"
    if "argparse" not in script.read_text():
        assert not rest
        return
    original = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        original(parser, rest)
        raise _Parsed

    # Python puts the folder of a script it runs in front of the path.
    path = [str(script.parent), *sys.path]
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), mock.patch.object(sys, "path", path):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Parsed:
            return
        except SystemExit as error:
            raise AssertionError(f"{script.name} does not take {rest}") from error
    raise AssertionError(f"{script.name} did not read its command line")
