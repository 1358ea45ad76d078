"""Imported once transformers is: from then on it loads compressed models itself."""

from upop.checkpoints.saving.quantizer import register

register()
