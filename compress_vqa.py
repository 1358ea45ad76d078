"""Compress BLIP for visual question answering (VQAv2): the published command. `upop compress vqa` is the same."""

from upop.cli.published import run_blip

if __name__ == "__main__":
    run_blip("vqa", "./configs/vqa.yaml")
