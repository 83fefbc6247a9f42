"""Litespark: pre-training of Llama-like models with 3D parallelism, from a laptop to GPU nodes.

Importing this package loads nothing heavy: torch is imported by the modules that compute.
"""

from litespark.version import __version__

__all__ = ["__version__"]
