"""Compress BLIP for captioning (COCO): the published command. `upop compress caption` is the same."""

from upop.cli.published import run_blip

if __name__ == "__main__":
    run_blip("caption", "./configs/caption_coco.yaml")
