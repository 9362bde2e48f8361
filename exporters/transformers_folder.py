"""A transformers model's folder in a server's own layout: what compressed-tensors and GPTQ checkpoints share."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpq.core.allocation import Allocation
from mpq.core.scheme import Scheme
from mpq.exporters.folder import copy_side_files, names_of, refuse_foreign, write_checksums, write_folder
from mpq.exporters.mpq.state import model_config, other_state, specs_of, write_config
from mpq.exporters.shards import WHOLE, write_tensors
from mpq.exporters.targets import CONSUMERS, check, check_model
from mpq.kernels.layout import Packed, pack
from mpq.kernels.weight import empty_weight
from mpq.quantized import Moments, checked_layers, quantized_layers


def export_transformers(
    consumer: str,
    model: nn.Module,
    allocation: Allocation,
    folder: str | os.PathLike[str],
    named: Callable[[str, Packed, Scheme], Mapping[str, Tensor]],
    config: Callable[[], Mapping[str, Any]],
    *,
    method: str,
    second_moments: Moments | None,
    shard: int,
    side_files: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Write the folder of a consumer that reads transformers models; the folder.

    Args:
        consumer: a name of `CONSUMERS`, whose rules are checked first.
        named: the tensors, by their names in the file, of a layer's packed weight; asked of weights without data too.
        config: the `quantization_config` of config.json, asked for when the allocation has passed the rules.
        model, allocation, folder, method, second_moments, shard, side_files: as in
            `mpq.exporters.mpq.checkpoint.export`.

    Raises:
        MpqError: no transformers model, a scheme that cannot be held, fused layers in several schemes, foreign files.
    """
    check_model(CONSUMERS[consumer], model)
    check(CONSUMERS[consumer], allocation)
    refuse_foreign(folder, (WHOLE, "config.json", "allocation.json", *names_of(side_files)))
    others, _ = other_state(model, allocation)
    specs = specs_of(others)
    for layer, scheme in checked_layers(model, allocation):
        empty = empty_weight(scheme.weight, layer.rows, layer.cols, device="meta").matrix()
        specs.update(specs_of(named(layer.name, empty, scheme)))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from others.items()
        for layer, scheme, quantized in quantized_layers(model, allocation, method, second_moments):
            yield from named(layer.name, pack(quantized), scheme).items()

    with write_folder(folder) as draft:
        digests = write_tensors(draft, specs, tensors(), shard)
        write_config(draft, {**model_config(model), "quantization_config": config()}, model)
        copy_side_files(draft, side_files)
        allocation.save(draft / "allocation.json")
        write_checksums(draft, digests)
    return Path(folder)
