"""`import upop` beside fewer libraries than it asks for."""

from __future__ import annotations

import subprocess
import sys

_ALONE = """
import sys
sys.modules["pydantic"] = None  # as if it were not installed
import torch, upop
from torch import nn
layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
upop.calibrate(model, [torch.randn(2, 5, 16)], 0.5)
assert model.layers[0].linear1.out_features < 32
for ask in ("upop.save", "from upop import load"):
    try:
        exec(ask)
    except ImportError as error:
        print(error)
try:
    upop.prune
except AttributeError as error:
    print(error)
"""


def test_the_method_works_with_torch_alone_and_files_say_what_is_missing() -> None:
    done = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    save, load, other = done.stdout.splitlines()
    assert save == "upop.save needs pydantic, which is not installed. pip install pydantic"
    assert load == "upop.load needs pydantic, which is not installed. pip install pydantic"
    assert other == "module 'upop' has no attribute 'prune'"
