"""The compiled inner loops of rounding (`src/rounding.c`); without them PyTorch computes the same results, slower."""

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from mpq.core import libraries
from mpq.core.grids import Grid
from mpq.rounding.codes import decode, encode

KINDS = {"int": 0, "float": 1, "codebook": 2}
LANES = 16  # thresholds that rounding.c compares at once
ELEMENTS_OF_A_THREAD = 2**19  # least work for which starting a thread pays


class GridStruct(ctypes.Structure):
    """`grid_t` of rounding.c."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("lowest", ctypes.c_float),
        ("highest", ctypes.c_float),
        ("offset", ctypes.c_int64),
        ("smallest_power", ctypes.c_float),
        ("steps", ctypes.c_float),
        ("count", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("thresholds", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
    )


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library, or None where the package was installed without a compiler."""
    path = libraries.path_of(libraries.ROUNDING)
    return None if path is None else ctypes.CDLL(path)


def serves(grid: Grid, *tensors: Tensor) -> bool:
    """Whether the compiled loops support a grid and these tensors."""
    on_cpu = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    return on_cpu and grid.family in KINDS and grid.bits <= 8 and library() is not None


def gptq_block(
    pending: Tensor,  # (rows, width), changed in place; columns may belong to a wider matrix
    scales: Tensor,  # (rows, width), strides as pending's
    lowest: Tensor,  # (rows, width), the same
    inverse: Tensor,  # (width, width)
    codes: Tensor,  # uint8 (rows, width), written
    grid: Grid,
) -> Tensor:
    """Round a block of columns one by one, compensating each error in later columns: the errors (rows, width)."""
    rows, width = pending.shape
    inverse = inverse.contiguous()  # factorizations are column-major
    errors = pending.new_empty(rows, width)
    described = _described(grid)
    function = _function("mpq_gptq_block")

    def work(first: int, last: int) -> None:
        parts = (tensor[first:last].data_ptr() for tensor in (pending, scales, lowest, codes, errors))
        strides = (pending.stride(0), codes.stride(0), inverse.stride(0))
        function(
            *map(ctypes.c_void_p, parts), ctypes.c_void_p(inverse.data_ptr()),
            *map(ctypes.c_int64, (last - first, width, *strides)), ctypes.byref(described.struct),
        )  # fmt: skip

    _by_rows(work, rows, width * width)
    return errors


def best_scales(
    elements: Tensor,  # (rows or 1, groups, size)
    weights: Tensor,  # the same
    factors: Sequence[Tensor],  # (rows or 1, groups) of each candidate
    zeros: Sequence[Tensor] | None,  # zero points of each candidate
    grid: Grid,
) -> tuple[Tensor, Tensor]:
    """For each group, the index of the candidate of least weighted squared error, int64, and that error, float32."""
    shape, size = elements.shape[:-1], elements.shape[-1]
    flat, shares = elements.contiguous(), weights.contiguous()
    groups = flat.numel() // size
    offered = torch.stack([factor.reshape(-1) for factor in factors]).float()
    offsets = None if zeros is None else torch.stack([zero.reshape(-1) for zero in zeros]).float()
    best, least = flat.new_empty(groups, dtype=torch.int64), flat.new_empty(groups)
    described, function = _described(grid), _function("mpq_best_scales")

    def work(first: int, last: int) -> None:
        function(
            _from(flat, first * size), _from(shares, first * size), *map(ctypes.c_int64, (last - first, size)),
            _from(offered, first), _from(offsets, first), *map(ctypes.c_int64, (len(offered), groups)),
            _from(best, first), _from(least, first), ctypes.byref(described.struct),
        )  # fmt: skip

    _by_rows(work, groups, len(offered) * size)
    return best.reshape(shape), least.reshape(shape)


def refit(
    elements: Tensor,  # (rows or 1, groups, size)
    weights: Tensor,  # the same
    factors: Tensor,  # (rows or 1, groups)
    zeros: Tensor | None,  # the same
    grid: Grid,
) -> Tensor:
    """For each group, the scale of least weighted squared error for the codes that its factor gives; 0 where all are as
    good.
    """
    size, flat, shares = elements.shape[-1], elements.contiguous(), weights.contiguous()
    used, fits = factors.float().contiguous(), elements.new_empty(factors.shape)
    offsets = None if zeros is None else zeros.float().contiguous()
    described, function = _described(grid), _function("mpq_refit")

    def work(first: int, last: int) -> None:
        function(
            _from(flat, first * size), _from(shares, first * size), *map(ctypes.c_int64, (last - first, size)),
            _from(used, first), _from(offsets, first), _from(fits, first), ctypes.byref(described.struct),
        )  # fmt: skip

    _by_rows(work, fits.numel(), size)
    return fits


def _from(tensor: Tensor | None, element: int) -> ctypes.c_void_p:
    """The address of an element of a contiguous tensor."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr() + element * tensor.element_size())


class _Described:
    """A grid as passed to the library, with the tables that it points to."""

    def __init__(self, grid: Grid) -> None:
        numbers = sorted({value for value in grid.values().tolist() if value == value})
        values = torch.tensor(numbers, dtype=torch.float32, device="cpu")
        padding = values.new_full((-(len(values) - 1) % LANES + LANES,), torch.inf)
        self.tables = (values, torch.cat([_thresholds(values, grid), padding]), encode(values, grid))
        self.struct = GridStruct(
            KINDS[grid.family], grid.min, grid.max, grid.offset, 2.0 ** (1 - grid.bias), 2.0**grid.mantissa,
            len(values), *(table.data_ptr() for table in self.tables),
        )  # fmt: skip


def _thresholds(values: Tensor, grid: Grid) -> Tensor:
    """The smallest float32 numbers that are rounded to each of the sorted values but the first."""
    doubled = values.double()
    half_way = (doubled[1:] + doubled[:-1]) / 2
    nearby = half_way.float()
    above = torch.nextafter(nearby, torch.full_like(nearby, torch.inf))
    is_above = (nearby > half_way) | ((nearby == half_way) & (decode(encode(nearby, grid), grid) == values[1:]))
    return torch.where(is_above, nearby, above)


@lru_cache(maxsize=64)
def _described(grid: Grid) -> _Described:
    return _Described(grid)


def _function(name: str) -> Callable[..., None]:
    loaded = library()
    assert loaded is not None
    function: Callable[..., None] = getattr(loaded, name)
    return function


def _by_rows(work: Callable[[int, int], None], rows: int, weight: int) -> None:
    """Call `work(first, last)` for shares of the rows, each of `weight` elements, in a thread each."""
    count = max(1, min(torch.get_num_threads(), rows * weight // ELEMENTS_OF_A_THREAD))
    ends = [rows * share // count for share in range(count + 1)]
    if count == 1:
        return work(0, rows)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, ends[:-1], ends[1:]))
    return None
