"""`python -m upop`: the command, where a launcher wants a module."""

from upop.cli import main

if __name__ == "__main__":
    main()
