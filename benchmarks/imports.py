"""Import times in fresh processes, in turn: processor seconds, and which large libraries are imported too.

`import upop` is compared with `import torch` in the same run, as a ratio on one machine.

    python benchmarks/imports.py
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from upop.files import write_json
from upop.machine import machine

RESULTS = Path(__file__).parent / "results"
LARGE = ("torch", "torch._dynamo", "transformers", "timm", "torchvision", "numpy", "pydantic", "safetensors")
WAYS = {
    "nothing": "pass",
    "import torch": "import torch",
    "import torch, upop": "import torch, upop",
    "import torch, upop.pruning": "import torch, upop.pruning",
    "upop.Compression": "import torch, upop; upop.Compression",
    "upop.find_prunable": "import torch, upop; upop.find_prunable",
    "upop.save": "import torch, upop; upop.save",
    "upop --help": "import sys; sys.argv = ['upop', '--help']; import upop.cli; upop.cli.main()",
    "upop --version": "import sys; sys.argv = ['upop', '--version']; import upop.cli; upop.cli.main()",
    "upop compress nlvr --help": "import sys; sys.argv = ['upop', 'compress', 'nlvr', '--help']\n"
    "import upop.cli; upop.cli.main()",
}
_AT_EXIT = """
import atexit, json, sys
atexit.register(lambda: sys.stderr.write(json.dumps([name for name in {} if name in sys.modules])))
"""


def seconds(code: str) -> float:
    """Return the processor seconds, user and system, of a fresh interpreter that runs some code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imported(code: str) -> list[str]:
    """Return which large libraries are loaded when some code has run."""
    done = subprocess.run(
        [sys.executable, "-c", _AT_EXIT.format(LARGE) + code], check=True, capture_output=True, text=True
    )
    return list(json.loads(done.stderr.splitlines()[-1]))


def main() -> None:
    """Measure every way, round by round, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "imports_cpu.json")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    loaded = {name: imported(code) for name, code in WAYS.items()}  # which also writes the compiled modules
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(asked.rounds):
        for name, code in WAYS.items():
            taken[name].append(seconds(code))
    medians = {name: statistics.median(found) for name, found in taken.items()}
    torch = medians["import torch"]
    content = {
        "machine": machine(),
        "command": "python benchmarks/imports.py",
        "timed": f"processor seconds of a fresh process, the median of {asked.rounds} in turn",
        "seconds": {name: round(found, 3) for name, found in medians.items()},
        "seconds_beyond_import_torch": {
            name: round(found - torch, 3) for name, found in medians.items() if "torch" in loaded[name]
        },
        "large_libraries": loaded,
    }
    write_json(asked.out, content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
