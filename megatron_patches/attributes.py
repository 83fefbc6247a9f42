"""How a patch changes upstream: its replacements are made, and taken back, together."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

Undo = Callable[[], None]


class SymbolMissingError(LookupError):
    """A dotted name leads nowhere in the installed packages."""


class _Absent:
    """Stands for an attribute that the owner did not hold itself (it may inherit one)."""


_ABSENT = _Absent()


def replace_attributes(*replacements: tuple[Any, str, object]) -> Undo:
    """Set `owner.name = value` for each `(owner, name, value)`; return what puts the old ones back.

    What is put back is the owner's own raw entry, so static methods stay static methods and an
    attribute that was inherited or missing is deleted again.
    """
    originals = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)

    def undo() -> None:
        for owner, name, original in reversed(originals):
            if isinstance(original, _Absent):
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    return undo


class ModuleView(ModuleType):
    """A module as one importer sees it: some names replaced, all others those of the real one.

    Setting a view in an importing module's namespace leaves every other importer untouched.
    """

    def __init__(self, module: ModuleType, **replaced: object) -> None:
        super().__init__(module.__name__, module.__doc__)
        self.__dict__.update(replaced)
        self.__dict__["_viewed"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_viewed"], name)


def resolve(dotted: str) -> object:
    """Return what a dotted name such as `package.module.Class.method` leads to.

    Raises:
        SymbolMissingError: when a part of the name does not exist.
    """
    parts = dotted.split(".")
    found: Any = None
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError as error:
            # A module that exists but misses a dependency of its own is not a symbol that moved.
            if not dotted.startswith(str(error.name)):
                raise
            continue
        break
    else:
        raise SymbolMissingError(dotted)
    for name in parts[split:]:
        try:
            # Static, so that a method is the same object each time it is looked up.
            found = inspect.getattr_static(found, name)
        except AttributeError as error:
            raise SymbolMissingError(dotted) from error
    return found
