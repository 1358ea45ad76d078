"""The first import of a process that imports much: nothing of that is garbage. `unburdened` ends it."""

import gc

gc.disable()
