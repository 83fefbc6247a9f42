"""Repairs of megatron-core, one file per group of upstream symbols; README.md lists them.

`apply_patches` puts in what the machine needs, `revert_patches` takes everything out again.
Importing this package changes nothing and does not import megatron-core.
"""

from megatron_patches.registry import applied_patches, apply_patches, revert_patches

__all__ = ["applied_patches", "apply_patches", "revert_patches"]
