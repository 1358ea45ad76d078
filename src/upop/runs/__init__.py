"""One loop for training, search and retraining, on Accelerate."""
