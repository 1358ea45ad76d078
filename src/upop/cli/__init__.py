"""The command line: `upop`, and the published scripts."""
