"""Generated pictures of coloured shapes, with sentences, captions, questions and answers that fit them."""

from upop.data.shapes.write import FORMATS, Summary, write_shapes

__all__ = ["FORMATS", "Summary", "write_shapes"]
