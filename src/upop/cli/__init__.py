"""Commands: one module each, imported when it is called."""

import sys

from upop.libraries import missing


def main() -> None:
    """Run `upop`; if libraries of the command line are missing, print how to install them, with exit code 1."""
    try:
        from upop.cli.app import main as run
    except ModuleNotFoundError as error:
        sys.exit(str(missing(error, "The command upop")))
    run()
