"""Compress BLIP for retrieval (COCO): the published command. `upop compress retrieval` is the same."""

from upop.cli.published import run_blip

if __name__ == "__main__":
    run_blip("retrieval", "./configs/retrieval_coco.yaml")
