"""What tests do without, from the import of this module on.

- Waiting for the disk: no test outlives a power cut, and on some machines it would be most of the time.
- Full garbage collections of what the libraries made while they were imported, which stays: millions of objects.
"""

import gc
import os

os.fsync = lambda fd: None
gc.collect()
gc.freeze()
