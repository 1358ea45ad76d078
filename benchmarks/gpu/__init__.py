"""Measurements that need a GPU, by one command: `make gpu`."""
