"""Convolutional networks in integers alone, after HAWQ-V3 (arXiv 2011.10680): int32 sums, dyadic rescaling, int8 codes.

`integer_program(model, allocation, images)` turns a network into a program of integer operations, which runs here and,
exported, in ONNX Runtime (`mpq.exporters.onnx.integer`) with the same bits.
"""

from mpq.integer_only.build import integer_program
from mpq.integer_only.program import IntegerProgram, Step, run
from mpq.integer_only.ties import residual_ties

__all__ = ["IntegerProgram", "Step", "integer_program", "residual_ties", "run"]
