"""Measurements of this library, run from a checkout: `python -m benchmarks.NAME`, or `pytest benchmarks`."""
