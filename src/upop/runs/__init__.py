"""What runs a task: one loop for training, search and retraining on Accelerate, run directories, and resuming."""
