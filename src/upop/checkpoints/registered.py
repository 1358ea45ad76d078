"""Imported once transformers is: from then on it reloads compressed models by itself."""

from upop.checkpoints.saving.quantizer import register

register()
