"""Imported once transformers is: from then on it reloads compressed models by itself."""

from upop.checkpoints.quantizer import register

register()
