"""Other libraries on the workload of `catopt-xp bench`, on a CPU: PyTorch, JAX, scikit-learn and the chapter."""
