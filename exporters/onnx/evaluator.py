"""The reference run of a graph: onnx's reference evaluator, and ONNX Runtime's MatMulNBits by its definition."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def fields(stored: Tensor, bits: int) -> Tensor:
    """Unsigned fields of bytes, the lowest bits first: (..., bytes) to (..., bytes * 8 / bits), float32."""
    parts = [stored.long() >> start & 2**bits - 1 for start in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2).float()


def nbits_matrix(codes: Tensor, zeros: Tensor, values: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Codes (rows, cols) and zero points (rows, blocks) of a MatMulNBits with these attributes."""
    bits, rows, cols = values["bits"], values["N"], values["K"]
    blocks = -(-cols // values["block_size"])
    if zeros.ndim:
        return fields(codes, bits).reshape(rows, -1)[:, :cols], fields(zeros, bits).reshape(rows, -1)[:, :blocks]
    return fields(codes, bits).reshape(rows, -1)[:, :cols], torch.tensor(2.0 ** (bits - 1), dtype=torch.float32)


def reference_outputs(file: Path, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The graph's outputs, in float32, operation by operation as the standard defines them.

    Raises:
        Exception: of many kinds, for operators that the installed onnx does not evaluate.
    """
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(str(file), new_ops=[_matmul_nbits()])
    given = [part.detach().numpy() for part in inputs if isinstance(part, Tensor)]
    outputs = session.run(None, dict(zip(session.input_names, given, strict=True)))
    return [torch.from_numpy(np.asarray(part)) for part in outputs]


@lru_cache(maxsize=1)
def _matmul_nbits() -> Any:
    from onnx.reference.op_run import OpRun

    class MatMulNBits(OpRun):  # type: ignore[misc, unused-ignore]
        """com.microsoft's operator: A (..., K) times a weight (N, K) of packed codes, scales by block."""

        op_domain = "com.microsoft"

        def _run(
            self, a: Any, codes: Any, scales: Any, zeros: Any = None, *_: Any, **values: Any
        ) -> tuple[NDArray[Any]]:
            stored = torch.zeros((), dtype=torch.float32) if zeros is None else torch.tensor(zeros)
            numbers, points = nbits_matrix(torch.tensor(codes), stored, values)
            size, cols = values["block_size"], values["K"]
            steps = torch.tensor(scales).reshape(values["N"], -1).repeat_interleave(size, 1)[:, :cols]
            points = points.repeat_interleave(size, 1)[:, :cols] if points.ndim else points
            return (a @ ((numbers - points) * steps).numpy().T,)

    return MatMulNBits
