"""The one place where Litespark's version is written."""

__version__ = "0.1.0"
