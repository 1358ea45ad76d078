"""What tests do without, from the import of this module on.

- Waiting for the disk: no test outlives a power cut, and on some machines it would be most of the time.
- Full garbage collections of what the libraries made while they were imported, which stays: millions of objects; and
  young ones at every 700 objects, which were a tenth of all.
- Looking for compiled code among what was imported, where none is.
- Reading a model that an earlier test has read: the groups of all kinds of models are kept, not of the last few, and
  for all processes of a test run.
- Asking the driver for GPUs, where there are none, at every operation on fake tensors: once Lightning is imported,
  this is slow.
- Laying out the figures of runs, and drawing them sharply and again for each run: later runs of a process get the
  first ones. `tests/report` draws all of its own.
- Timing a model thirty times over: what becomes of the time that a run measures is the same of one pass.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch

from shared_kinds import FOLDER, share
from upop.pruning import compiled, known

os.fsync = lambda fd: None
known._MOST_KINDS = 4096
compiled.referring_to = gc.get_referrers  # which passes over what is frozen below
if not torch.cuda.device_count():
    torch.cuda._cached_device_count = 0
if FOLDER in os.environ:
    share(os.environ[FOLDER])
if "upop.report.latency" in sys.modules:
    sys.modules["upop.report.latency"].measure_latency.__kwdefaults__.update(repeats=1, warmup=1)
if "upop.runs.run" in sys.modules:
    figures = sys.modules["upop.report.figures"]
    drawn: dict[str, bytes] = {}

    def save_roughly(figure: Any, path: Path, *, overwrite: bool = False) -> None:
        if path.name in drawn:
            with figures.replacing_file(path, overwrite or figures.wrote_image) as part:
                part.write_bytes(drawn[path.name])
            return
        figure.set_layout_engine("none")
        sharp, figures.DPI = figures.DPI, 20
        try:
            figures.save_figure(figure, path, overwrite=overwrite)
        finally:
            figures.DPI = sharp
        drawn[path.name] = path.read_bytes()

    sys.modules["upop.runs.run"].save_figure = save_roughly
gc.freeze()
gc.set_threshold(50_000, 20, 20)
gc.enable()  # it is off while everything is imported
