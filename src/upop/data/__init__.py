"""Readers of the published annotation formats and of rows of files; transforms of texts and images."""
