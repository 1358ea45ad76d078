"""Generated pictures of coloured shapes, with sentences that are true or false of them."""

from upop.data.shapes.write import Summary, write_nlvr

__all__ = ["Summary", "write_nlvr"]
