"""What lies at a path: files of weights, JSON beside them, and copies from the hub or a URL."""
