"""Configurations that describe a cut model by their own numbers: sizes, fewer layers, fewer tokens."""
