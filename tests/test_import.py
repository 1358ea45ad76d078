"""What an import of upop takes, and upop beside fewer libraries than it can use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import upop
from upop.cli import app
from upop.libraries import EXTRAS

OPTIONAL = (*EXTRAS, "open_clip")


def run(code: str, *, without: tuple[str, ...] = (), cwd: Path | None = None) -> str:
    """Run Python as if some libraries were not installed; return what it printed."""
    start = f"import sys\nfor name in {without!r}: sys.modules[name] = None\n"
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    libraries = {*OPTIONAL} - {"typer"}
    shown = run(
        "import upop, upop.cli.app\n"
        "print('torch' in sys.modules)\n"
        "import upop.pruning\n"
        f"print(sorted({libraries!r} & sys.modules.keys()))\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    assert shown.splitlines() == ["False", "[]", "False"]


def test_no_help_imports_torch() -> None:
    commands = [name for name in app.app.info.cls.later if name not in ("train", "compress", "evaluate")]  # type: ignore[union-attr, attr-defined]
    shown = run(
        "from upop.cli import app\n"
        f"for words in [[name] for name in {commands!r}] + [['compress', 'nlvr'], ['data', 'shapes']]:\n"
        "  sys.argv = ['upop', *words, '--help']\n"
        "  try:\n    app.main()\n  except SystemExit as ended:\n"
        "    print('::', *words, ended.code, 'torch' in sys.modules)\n"
    )
    assert len(commands) > 8
    assert {line for line in shown.splitlines() if line.startswith("::")} == {
        f":: {words} 0 False" for words in (*commands, "compress nlvr", "data shapes")
    }


def test_the_list_of_commands_says_what_the_commands_say() -> None:
    commands = app.app.info.cls
    assert commands is not None and issubclass(commands, app.LaterGroup)
    listed = get_command(app.app)
    for name, later in commands.later.items():
        text = " ".join((listed.commands[name].help or "").split())  # type: ignore[attr-defined]
        assert text.startswith(f"{later.summary}."), name


_ALONE = """
import torch, upop
from torch import nn

def built():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

batch = torch.randn(2, 5, 16)
model = built()
upop.calibrate(model, [batch], 0.5)
assert model.layers[0].linear1.out_features < 32
upop.save(model, "calibrated")
again = upop.load("calibrated", built())
assert torch.equal(model(batch), again(batch))

model = built()
optimizer = torch.optim.SGD(model.parameters(), 0.01)
compression = upop.Compression(model, ratio=0.4, steps=6, teacher=False)
for step in range(6):
    compression.loss(model(batch).square().mean()).backward()
    compression.step(optimizer)
    optimizer.zero_grad()
compression.finish()
upop.save(model.eval(), "trained")
assert torch.equal(model(batch), upop.load_into(built(), "trained")(batch))
print(upop.count_parameters(model) < upop.count_parameters(built()))
for ask in ('upop.load("Some/model")', "upop.load_official", "from upop import load_official"):
    try:
        exec(ask)
    except ImportError as error:
        assert isinstance(error, upop.errors.UPopError)
        print(error)
"""


def test_a_model_of_torch_is_compressed_saved_and_loaded_beside_torch_alone(tmp_path: Path) -> None:
    done, *asked = run(_ALONE, without=OPTIONAL, cwd=tmp_path).splitlines()
    assert done == "True"
    assert asked
    assert all(line.endswith(("pip install 'upop[hf]'", "pip install 'upop[timm]'")) for line in asked), asked


_WITHOUT_FILES = """
import torch, upop
from torch import nn
layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
upop.calibrate(model, [torch.randn(2, 5, 16)], 0.5)
assert model.layers[0].linear1.out_features < 32
for ask in ("upop.save", "from upop import load", "upop.prune"):
    try:
        exec(ask)
    except (ImportError, AttributeError) as error:
        print(error)
"""


def test_the_method_needs_torch_alone() -> None:
    save, load, other = run(_WITHOUT_FILES, without=("pydantic", "numpy")).splitlines()
    for name, line in (("save", save), ("load", load)):
        assert line.startswith(f"upop.{name} needs pydantic") and line.endswith("pip install pydantic")
    assert other == "module 'upop' has no attribute 'prune'"


@pytest.mark.parametrize(
    ("without", "words", "said"),
    [
        (("typer",), "--help", "The command upop needs typer, which is not installed. Run: pip install 'upop[cli]'"),
        pytest.param(
            ("accelerate",),
            "train nlvr",
            "needs accelerate, which is not installed. Run: pip install 'upop[tasks]'",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_command_names_what_it_lacks(without: tuple[str, ...], words: str, said: str) -> None:
    code = f"sys.argv = ['upop', *{words.split()!r}]\nfrom upop.cli import main\nsys.stderr = sys.stdout\n"
    code += "try: main()\nexcept SystemExit as ended: print(ended.code)"
    shown = " ".join(run(code, without=without).split())
    assert said in shown


@pytest.mark.slow  # the first is how most tests do it
@pytest.mark.parametrize("order", ["import upop, transformers", "import transformers, upop"])
def test_transformers_knows_of_compressed_models_whichever_is_imported_first(order: str) -> None:
    code = (
        f"{order}\ntransformers.BertModel\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
    )
    assert run(code + "print('upop' in known)") == "True\n"


def test_there_is_one_pruner_and_one_way_to_cut() -> None:
    assert upop.Pruner is upop.pruning.Pruner
    assert upop.shrink is upop.pruning.shrink
    assert upop.calibrate is upop.pruning.calibrate


def test_folders_of_transformers_are_opened_without_timm(tmp_path: Path) -> None:
    code = "import upop.checkpoints.formats.transformers, upop.checkpoints.export.plain_models; print('opened')"
    assert run(code, without=("timm",), cwd=tmp_path).splitlines()[-1] == "opened"
