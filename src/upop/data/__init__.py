"""Readers of the published annotation formats and of rows of files; transforms of text and images."""
