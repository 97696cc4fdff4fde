"""F4: the training program."""
