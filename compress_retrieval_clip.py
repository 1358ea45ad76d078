"""Compress CLIP for retrieval (COCO, Flickr30K): the published command. `upop compress retrieval-clip` is the same."""

from upop.cli.published import run_blip

if __name__ == "__main__":
    run_blip("retrieval-clip", "./configs/retrieval_coco_clip.yaml")
