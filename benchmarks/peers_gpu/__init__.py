"""This library, PyTorch and JAX on the workload of `catopt-xp bench`, on a GPU (`python -m benchmarks.gpu`)."""
