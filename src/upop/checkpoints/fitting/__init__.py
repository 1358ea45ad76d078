"""Fitting a dense model to a file: it is built on the meta device, cut to the shapes in the file, and filled."""
