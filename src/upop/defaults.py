"""Values that the help of commands shows; apart, because help imports no deep learning library."""

from pathlib import Path

RUNTIMES = ("eager", "compile", "onnxruntime", "openvino")
"""Runtimes in which latency is measured."""
POINTS = 6
"""Number of sizes at which a kind of layer is measured, besides the dense one."""
RECIPES = Path("configs/recipes.yaml")
"""File of the published runs."""
