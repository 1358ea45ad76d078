"""What only a GPU can show, by one command: `make gpu`."""
