"""Checkpoints: the published files, and our own folders."""

from upop.checkpoints.folder import WEIGHTS, is_folder, load, save
from upop.checkpoints.official import load_official, save_official
from upop.checkpoints.read import read_weights

__all__ = ["WEIGHTS", "is_folder", "load", "load_official", "read_weights", "save", "save_official"]
