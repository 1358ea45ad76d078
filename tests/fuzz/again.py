"""Try one bad input again, in this process: `PYTHONPATH=tests python -m fuzz.again "folder: nlvr" 17`."""

import sys
import tempfile
import traceback
from pathlib import Path

from fuzz.engine import attempt, confined, generator, prepared
from fuzz.readers import READERS

if __name__ == "__main__":
    reader, number = sys.argv[1], int(sys.argv[2])
    folder = Path(tempfile.mkdtemp())
    touched = confined(folder)
    case = prepared(READERS[reader], folder)
    refused, failure = attempt(case, reader, number, touched)
    sys.stdout.write(f"{failure if failure is not None else 'refused' if refused else 'read'}\nin {folder}\n")
    try:
        case(generator(reader, number))
    except BaseException:
        traceback.print_exc()
