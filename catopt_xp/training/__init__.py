"""One training run, from the arguments of `train` to its result."""
