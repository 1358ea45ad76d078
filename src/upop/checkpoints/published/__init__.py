"""Published checkpoints: sizes from shapes, names, and resized position embeddings, a module per architecture."""
