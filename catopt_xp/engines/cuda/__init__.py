"""The panel engine of an NVIDIA GPU."""
