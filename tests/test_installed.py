"""What is built from this repository, installed alone, in an empty folder: no command needs the repository."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from upop.packaged import located
from upop.settings import read_settings
from upop.tasks.nlvr import NlvrSettings

ROOT = Path(__file__).parents[1]
_MADE = ("*.egg-info", "__pycache__", ".git", ".venv", ".*_cache", ".hypothesis", "build", "dist", "output")


def python(*words: str, cwd: Path, **environment: str) -> str:
    """Run Python; return what it printed, standard error included."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def built(kind: str, source: Path, out: Path) -> Path:
    """Build an archive with the backend that pyproject.toml names; return its path."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    return out / python("-c", code, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "repository"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*_MADE))
    with tarfile.open(built("sdist", copy, folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir())


@pytest.fixture(scope="module")
def installed(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel, built from the source archive, installs."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(built("wheel", unpacked, folder)) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *lines: str) -> str:
    """Run Python that begins with an import of the installed upop alone, in one process; return what it printed."""
    where = f"import upop; from pathlib import Path; assert Path(upop.__file__).is_relative_to({str(installed)!r})"
    code = "\n".join([where, "from typer.testing import CliRunner", "from upop.cli.app import app", *lines])
    return python("-c", code, cwd=cwd, PYTHONPATH=str(installed))


def invoked(line: str, code: int = 0) -> str:
    """A line of Python that runs a command line and prints what it prints."""
    return (
        f"done = CliRunner().invoke(app, {line.split()!r}); print(done.output); assert done.exit_code == {code}, done"
    )


def test_the_source_archive_holds_all_that_the_tests_need(unpacked: Path) -> None:
    kept = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    for folder in ("src", "tests", "docs", "benchmarks", "assets", "configs", ".ci"):
        mine = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
        mine = {path for path in mine if "__pycache__" not in path.parts and "egg-info" not in str(path)}
        assert mine, folder
        assert not mine - kept, sorted(mine - kept)[:5]
    for file in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "LICENSE", ROOT / "pyproject.toml"]:
        assert file.relative_to(ROOT) in kept


def test_lmms_eval_finds_upop_when_it_starts(installed: Path, tmp_path: Path) -> None:
    shown = run(
        installed,
        tmp_path,
        "from importlib.metadata import distributions",
        f"(mine,) = distributions(name='upop', path=[{str(installed)!r}])",
        "(asked,) = [each for each in mine.entry_points if each.group == 'lmms_eval.models']",
        "print(asked.load()())",  # an iterable of models, or what returns one
    )
    assert shown.splitlines()[-1] == "()"


def test_the_wheel_holds_what_commands_read(installed: Path) -> None:
    for file in (ROOT / "src" / "upop").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert (installed / file.relative_to(ROOT / "src")).is_file(), f"{file} is not in the wheel"


@pytest.mark.slow
def test_commands_work_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    shown = run(
        installed,
        tmp_path,
        invoked("recipes"),
        invoked("run coco-caption-4x --dry-run"),
        invoked("inspect assets/shapes-nlvr"),
        invoked("data shapes --task nlvr --out data --size 40"),
        # A config that nobody copied is found, and so is a mistake in its name.
        invoked("compress nlvr --config configs/nlvr.yaml --output-dir out --device cpu", code=1),
        "print(repr(done.exception))",
        invoked("train caption --config configs/caption_cco.yaml", code=1),
        "print(repr(done.exception))",
    )
    assert "nlvr2-10x" in shown
    assert "missing  annotation" in shown  # what a dry run looks for lies in the folder, not in the package
    assert "BlipNlvr" in shown
    assert f"is used: {installed / 'upop/configs/nlvr.yaml'}" in shown.replace("\n", "")
    assert "pretrained/model_base_nlvr.pth is no checkpoint" in shown  # as the settings say, and it is looked for here
    assert "did you mean 'caption_coco.yaml'" in shown
    assert {path.name for path in tmp_path.iterdir()} <= {"data", "out"}


def test_a_config_of_the_working_directory_beats_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    shapes = read_settings(NlvrSettings, Path("configs/shapes/nlvr.yaml"), {})
    assert shapes.image_size == 48
    assert str(ROOT / "src/upop/configs/shapes/nlvr.yaml") in caplog.text
    caplog.clear()
    Path("configs").mkdir()
    Path("configs/nlvr.yaml").write_text("max_epoch: 77\n")
    assert read_settings(NlvrSettings, Path("./configs/nlvr.yaml"), {}).max_epoch == 77
    assert not caplog.records


def test_only_what_is_the_packages_is_looked_for_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs/../report/page.py", "nlvr.yaml", "other/configs/nlvr.yaml", "/configs/nlvr.yaml", "configs"):
        assert located(name) == Path(name)


@pytest.mark.slow
def test_the_demo_and_a_report_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    shown = run(
        installed,
        tmp_path,
        "from upop.cli import demo",
        "if __name__ == '__main__':",
        "  demo._SIZE = 640",  # of 20,000: the way is the same
        "  " + invoked("demo --device cpu"),
        "  " + invoked("report output/demo/upop --out page.html"),
        "  "
        + invoked(
            "evaluate nlvr --config configs/shapes/nlvr.yaml --pretrained output/demo/upop/best"
            " --set image_root=output/demo/data/images/NLVR2 --set ann_root=output/demo/data/annotation"
            " --set tokenizer=output/demo/data/tokenizer --set num_workers=0 --output-dir again"
        ),
    )
    assert "UPop 1.7" in shown
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert (tmp_path / "output/demo/report.html").is_file()
    assert (tmp_path / "again/results.json").is_file()


@pytest.mark.slow
def test_a_wheel_that_pip_installs_runs_the_commands_of_the_readme(unpacked: Path, tmp_path: Path) -> None:
    wheel = built("wheel", unpacked, tmp_path)
    environment = tmp_path / "environment"
    python("-m", "venv", str(environment), cwd=tmp_path)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    mine = subprocess.run(
        [scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # Its own packages come first, and then those of this environment, whose upop is the repository's.
    (Path(mine) / "beside.pth").write_text(sysconfig.get_path("purelib"))
    pip = [scripts / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel]
    subprocess.run(pip, check=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def shown(line: str) -> str:
        program, *words = shlex.split(line, comments=True)
        done = subprocess.run(
            [scripts / program, *words],
            cwd=empty,
            env={**outside, "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    assert str(environment) in shown('python -c "import upop; print(upop.__file__)"')
    readme = (ROOT / "README.md").read_text().splitlines()
    (inspect,) = [line for line in readme if line.startswith("upop inspect deit_small")]
    assert "Prunable groups" in shown(inspect)
    save = (
        "import timm, upop; model = timm.create_model('vit_tiny_patch16_224', depth=1, img_size=32); "
        "upop.shrink(model, {group.name: range(group.size // 2) for group in upop.find_groups(model)}); "
        "upop.save(model, 'output/caption-2x/best')"
    )
    shown(f'python -c "{save}"')
    (export,) = [line for line in readme if line.startswith("upop export output/")]
    shown(export)
    assert (empty / "output/caption-2x/onnx/model.onnx").is_file()
    shown("upop data shapes --task nlvr --out data --size 40")
    assert "BlipNlvr" in shown("upop inspect assets/shapes-nlvr")
