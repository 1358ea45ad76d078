"""Names of tensors in upop, in transformers and in published files, and the configurations that go with them."""
