"""Compress BLIP for visual reasoning (NLVR2): the published command. `upop compress nlvr` is the same."""

from upop.cli.published import run_blip

if __name__ == "__main__":
    run_blip("nlvr", "./configs/nlvr.yaml")
