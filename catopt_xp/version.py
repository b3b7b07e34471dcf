"""The version, in one place. Floor F0."""

__version__ = "0.1.0"
