"""Compress BLIP for retrieval (Flickr30K): the published command. `upop compress retrieval` is the same."""

from upop.cli.published import run_blip

if __name__ == "__main__":
    run_blip("retrieval", "./configs/retrieval_flickr.yaml")
