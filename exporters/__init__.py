"""Writers of packed weights, one kind of file, one module; `mpq.exporters.targets` lists who reads them."""

import os
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError, expect, nearest_names
from mpq.exporters.holding import check
from mpq.exporters.targets import TARGETS

if TYPE_CHECKING:
    from torch import nn


def export(
    model: "nn.Module", allocation: Allocation, folder: str | os.PathLike[str], *, to: str = "mpq", **options: Any
) -> Path:
    """Write a model's layers in an allocation's formats, packed for a consumer: `mpq.export`; what was written.

    A trainable simulation (`mpq.simulate`, `mpq.finetune`) is written with exactly the numbers that it computes with,
    learned scales included: nothing is rounded again, whatever the method.

    Args:
        model: left as it is.
        allocation: layers and schemes.
        folder: made when missing.
        to: a name of `mpq.exporters.targets.TARGETS` or of a plugin.
        options: further fields of `mpq.exporters.request.ExportRequest`, all optional: `method` (rounding), `recipe`,
            `inputs`, `ranges`, `tokenizer`, `side_files`, `shard`, ...

    Raises:
        MpqError: an unknown target or option, or what the exporter refuses.
    """
    target = TARGETS.named(to)
    check(target, allocation)
    from mpq.exporters.request import ExportRequest
    from mpq.rounding.store import rounder_of
    from mpq.trained import as_trained, is_simulation

    expect(folder, (str, os.PathLike), "a folder's name")
    known = [field.name for field in fields(ExportRequest)]
    for name in options:
        if name not in known:
            raise MpqError(f"unknown option {name!r} of an export: {nearest_names(name, known)}")
    if is_simulation(model):
        otherwise = rounder_of(options.pop("method", "mse"), options.pop("second_moments", None))
        model, options["method"] = as_trained(model, allocation, otherwise)
    written: Path = target.load()(ExportRequest(model, allocation, folder, **options))
    return written


def exporter_named(name: str) -> Callable[..., Path]:
    """`export` to the target called `name`; MpqError with the known names when there is none."""
    return partial(export, to=TARGETS.named(name).name)
