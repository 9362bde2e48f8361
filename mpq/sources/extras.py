"""Imports of optional packages and users' modules."""

import importlib
import os
import sys
from collections.abc import Collection
from types import ModuleType
from typing import Any

from mpq.core.errors import MpqError, nearest_names


def need(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional package; MpqError with the command that installs it when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MpqError(f"{what} need the package {module}: pip install 'mpq[{extra}]' ({error})") from error


def import_object(path: str, untrusted: Collection[str] = ()) -> Any:
    """Import `package.module:name`; modules in the current folder can be imported.

    Args:
        path: module and name.
        untrusted: names read from files, which are never imported.

    Raises:
        MpqError: an untrusted name, a missing module, or a missing name in it (with the nearest ones).
    """
    if path in untrusted:
        raise MpqError(
            f"a file asks to import and call {path}: if you know that code, trust it (--trust, trust=True), "
            "or name the model and data yourself"
        )
    module_name, _, name = path.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise MpqError(f"{path!r} cannot be imported: {error}") from error
    finally:
        sys.path.remove(here)
    if not hasattr(module, name):
        known = [public for public in vars(module) if not public.startswith("_")]
        raise MpqError(f"module {module_name} has no {name!r}: {nearest_names(name, known)}")
    return getattr(module, name)
