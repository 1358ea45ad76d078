"""Compress Segmenter for ADE20K: the published command. `upop compress segmentation` is the same."""

from upop.cli.published_segmenter import run_segmenter

if __name__ == "__main__":
    run_segmenter()
