"""What tests do without, from the import of this module on.

- Waiting for the disk: no test outlives a power cut, and on some machines it would be most of the time.
- Full garbage collections of what the libraries made while they were imported, which stays: millions of objects.
- Reading a model that an earlier test has read: the groups of all kinds of models are kept, not of the last few, and
  for all processes of a test run.
"""

import gc
import os

from shared_kinds import FOLDER, share
from upop.pruning import known

os.fsync = lambda fd: None
known._MOST_KINDS = 4096
if FOLDER in os.environ:
    share(os.environ[FOLDER])
gc.collect()
gc.freeze()
