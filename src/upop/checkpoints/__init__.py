"""Checkpoints: the published files, and our own folders."""

from upop.checkpoints.description import is_folder
from upop.checkpoints.folder import WEIGHTS, load, load_into, save
from upop.checkpoints.official import load_official, save_official
from upop.checkpoints.quantizer import register
from upop.checkpoints.read import read_weights
from upop.checkpoints.recording import Pruner, calibrate, shrink

register()

__all__ = [
    "WEIGHTS",
    "Pruner",
    "calibrate",
    "is_folder",
    "load",
    "load_into",
    "load_official",
    "read_weights",
    "save",
    "save_official",
    "shrink",
]
