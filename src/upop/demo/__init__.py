"""Generated images of coloured shapes, with sentences, captions, questions and answers about them."""

from upop.demo.write import FORMATS, Summary, write_shapes

__all__ = ["FORMATS", "Summary", "write_shapes"]
