"""Train or evaluate CLIP with CrossGET for retrieval (Flickr30K): the published command."""

from upop.cli.published_crossget import run_crossget

if __name__ == "__main__":
    run_crossget()
