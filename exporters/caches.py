"""Formats of keys and values as options of the programs that serve a folder."""

from mpq.core.allocation import Allocation
from mpq.core.cache import EVERY, cache_name, head_bytes, parse_cache_format
from mpq.core.cache_formats import CacheFormats
from mpq.core.errors import MpqError
from mpq.core.layer import KEYS, VALUES
from mpq.core.registry import Target

FLOAT8 = "fp8-e4m3"  # a cast: vLLM's scales are 1 where a checkpoint has none
# llama.cpp's names of the types that a cache may have; those of V need flash attention.
LLAMA_TYPES = {
    "int4-g32": "q4_0", "int4-g32-asym": "q4_1", "int5-g32": "q5_0", "int5-g32-asym": "q5_1", "iq4_nl": "iq4_nl",
    "int8-g32": "q8_0", "fp16": "f16",
}  # fmt: skip
LAYERS, KINDS = "layers", "kinds"  # values of `Target.caches_alike`


def check_cache(target: Target, allocation: Allocation) -> None:
    """MpqError if a target does not support the formats of an allocation's keys and values."""
    cache = allocation.cache
    if cache is None or target.caches == EVERY:
        return
    if not target.caches:
        raise MpqError(
            f"{target.name} files cannot store cache formats: allocate without memory and kv_bits, or export "
            "allocation.with_cache(None)"
        )
    served = {parse_cache_format(name) for name in target.caches}
    shared: dict[object, str] = {}
    for entry, name in zip(cache.entries, cache.names, strict=True):
        format = parse_cache_format(name)
        if format not in served:
            wanted = head_bytes(format, entry.cols)
            near = min(served, key=lambda other: abs(head_bytes(other, entry.cols) - wanted))
            raise MpqError(
                f"{target.name} cannot serve {entry.name} in {name}: the nearest it can serve is {cache_name(near)}"
            )
        key = {KINDS: entry.kind, LAYERS: entry.name.rpartition(".")[0]}.get(target.caches_alike, entry.name)
        if shared.setdefault(key, name) != name:
            among = "keys and values of a layer" if target.caches_alike == LAYERS else f"the {entry.kind} of all layers"
            raise MpqError(
                f"{target.name} serves {among} in one format, not in {shared[key]} and {name}: allocate for it"
            )


def kv_cache_scheme(cache: CacheFormats | None) -> dict[str, object] | None:
    """compressed-tensors' entry for keys and values in fp8, by vLLM's default scale of 1; None for floats."""
    if cache is None or cache_name(parse_cache_format(FLOAT8)) not in cache.names:
        return None
    return {
        "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False, "group_size": None,
    }  # fmt: skip


def vllm_options(cache: CacheFormats) -> str:
    """vLLM's options for a cache: fp8, and the layers that stay in floating point."""
    floats = [
        entry.name.split(".")[1]
        for entry, name in zip(cache.entries, cache.names, strict=True)
        if entry.kind == KEYS and name != FLOAT8
    ]
    if len(floats) == len([entry for entry in cache.entries if entry.kind == KEYS]):
        return ""
    return " --kv-cache-dtype fp8" + (f" --kv-cache-dtype-skip-layers {' '.join(floats)}" if floats else "")


def llama_options(cache: CacheFormats) -> str:
    """llama.cpp's options for a cache."""
    types = {}
    for entry, name in zip(cache.entries, cache.names, strict=True):
        types[entry.kind] = LLAMA_TYPES[name]
    return f" -fa on -ctk {types[KEYS]} -ctv {types[VALUES]}"
