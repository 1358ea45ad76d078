"""Readers of the published annotation formats, text and image transforms, and generated data."""
