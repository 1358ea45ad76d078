"""Runs tasks: one loop for training, search and retraining on Accelerate; run directories and resuming."""
