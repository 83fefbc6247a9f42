"""Which patches exist, when each of them applies, and how they are put in and taken out.

Nothing happens at import: `apply_patches` is called once, by the training setup, before a model or
an optimizer is built.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from packaging.specifiers import SpecifierSet

from litespark.errors import LitesparkError
from megatron_patches.attributes import SymbolMissingError, Undo, resolve

DeviceType = Literal["cpu", "cuda"]

# The order in which they are applied; undoing goes backwards.
PATCH_NAMES = (
    "current_device",
    "synchronize",
    "tensor_cuda",
    "cuda_literals",
    "type_names",
    "rng",
    "cp_rope",
    "streams",
    "keep_pipeline_outputs",
    "ckpt_fork_queue",
    "distopt_torch_adam",
    "recompute_without_te",
    "wgrad_fusion",
    "distopt_bucket_padding",
    "refuse_silent_faults",
    "safe_checkpoint_metadata",
    "read_side_by_side",
)

_LOGGER = logging.getLogger("litespark.patches")


class Condition(Enum):
    """When a patch is needed."""

    CPU = "no CUDA device"
    NO_TE = "no Transformer Engine"
    ALWAYS = "always"


@dataclass(frozen=True)
class Patch:
    """One repair of one group of upstream symbols."""

    name: str
    symbols: tuple[str, ...]  # dotted upstream names it changes or leans on
    versions: str  # the versions of megatron-core it was written for, e.g. ">=0.16.1,<0.17"
    condition: Condition
    why: str
    remove_when: str
    apply: Callable[[], Undo]  # makes the change; what it returns takes it back


_active: dict[str, Undo] = {}
_active_device_type: DeviceType | None = None


def all_patches() -> tuple[Patch, ...]:
    """Return every patch, in the order of application."""
    return tuple(importlib.import_module(f"megatron_patches.{name}").PATCH for name in PATCH_NAMES)


def installed_megatron_version() -> str:
    """Return the version of megatron-core that is installed.

    Raises:
        LitesparkError: when there is none.
    """
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise LitesparkError(
            "megatron-core is not installed. Install it with: pip install litespark"
        ) from error


def has_transformer_engine() -> bool:
    """Say whether Transformer Engine can be imported, which an installed one need not."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError:
        return False
    return True


def apply_patches(device_type: DeviceType, only: Sequence[str] | None = None) -> list[str]:
    """Apply the patches that this machine needs and return the names of those newly applied.

    Args:
        device_type: what the run computes on; the CPU patches apply to "cpu" only.
        only: consider no other patches than these (for tests).

    Raises:
        LitesparkError: for an unknown name in `only`, a version of megatron-core that a patch was
            not written for, an upstream symbol that has moved, or a second call for another device
            type.
    """
    global _active_device_type
    if _active and device_type != _active_device_type:
        raise LitesparkError(
            f"the patches are in place for device type {_active_device_type!r}, asked for"
            f" {device_type!r}. Call revert_patches() first."
        )
    needed = [
        patch
        for patch in _selected(only)
        if patch.name not in _active and _holds(patch.condition, device_type)
    ]
    for patch in needed:
        check_patch(patch)
    for patch in needed:
        _active[patch.name] = patch.apply()
        _active_device_type = device_type
        _LOGGER.info("patch %s (%s): %s", patch.name, patch.condition.value, patch.why)
    return [patch.name for patch in needed]


def revert_patches() -> None:
    """Put every upstream symbol back, last patch first."""
    global _active_device_type
    while _active:
        _, undo = _active.popitem()
        undo()
    _active_device_type = None


def applied_patches() -> tuple[str, ...]:
    """Return the names of the patches in place, in the order of application."""
    return tuple(_active)


def active_device_type() -> DeviceType | None:
    """Return the device type that the patches in place are for, `None` when there are none."""
    return _active_device_type


def check_patch(patch: Patch) -> None:
    """Check that a patch fits the installed megatron-core.

    Raises:
        LitesparkError: when the version is out of the patch's range or a symbol is not there.
    """
    version = installed_megatron_version()
    if not SpecifierSet(patch.versions).contains(version, prereleases=True):
        raise LitesparkError(
            f"patch {patch.name} ({', '.join(patch.symbols)}) is written for megatron-core"
            f" {patch.versions}, installed is {version}. Install a version in that range."
        )
    for symbol in patch.symbols:
        try:
            resolve(symbol)
        except SymbolMissingError as error:
            raise LitesparkError(
                f"patch {patch.name}: upstream symbol {symbol} does not exist in megatron-core"
                f" {version} (the patch is written for {patch.versions}). It has moved: install a"
                " version in that range, or adapt the patch."
            ) from error


def _selected(only: Sequence[str] | None) -> tuple[Patch, ...]:
    unknown = [name for name in only or () if name not in PATCH_NAMES]
    if unknown:
        raise LitesparkError(
            f"unknown patches: {', '.join(unknown)}. Known are: {', '.join(PATCH_NAMES)}."
        )
    return tuple(patch for patch in all_patches() if only is None or patch.name in only)


def _holds(condition: Condition, device_type: DeviceType) -> bool:
    if condition is Condition.CPU:
        return device_type == "cpu"
    if condition is Condition.NO_TE:
        return not has_transformer_engine()
    return True
