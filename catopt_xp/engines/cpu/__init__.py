"""The panel engine of a CPU, compiled by numba."""
