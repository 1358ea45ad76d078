"""Compress DeiT (ImageNet): the published command. `upop compress classification` is the same."""

from upop.cli.published_deit import run_deit

if __name__ == "__main__":
    run_deit()
