"""Attention to packed caches in Triton's interpreter, against the plain reference; compiled without a device."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mpq.kernels import attention
from mpq.kernels.gpu.triton.attend import attend, stored_of
from mpq.kernels.gpu.triton.linear import EMULATE
from tests.kernels.test_attention import call

DEVICE = "cpu" if EMULATE else "cuda"
FORMATS = ("fp32", "fp16", "int8-token", "int8-asym", "int4-g32", "int4-g32-asym", "int2-asym")
SCRIPT = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mpq.kernels.gpu.triton.attend import stored_of
from mpq.kernels.gpu.triton.attend_kernel import attend_kernel
for keys, values, capability in json.loads(sys.argv[1]):
    types = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}
    signature = {
        "q": "*fp32", "key_codes": "*u8", "key_tables": types.get(keys, "*fp16"), "value_codes": "*u8",
        "value_tables": types.get(values, "*fp16"), "largest": "*fp32", "total": "*fp32", "mixed": "*fp32",
        **dict.fromkeys(("first", "last", "each", "block_count", "group"), "i32"), "scale": "fp32",
        **dict.fromkeys(("KEYS", "VALUES", "ROWS", "WIDTH"), "constexpr"),
    }
    constants = {"KEYS": stored_of(keys, 128), "VALUES": stored_of(values, 128), "ROWS": 16, "WIDTH": 128}
    built = triton.compile(ASTSource(attend_kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
    print(len(built.asm["cubin"]), built.asm["ptx"].count("st.local"))
"""


def check(arguments):
    placed = [
        [one.to(DEVICE) for one in part] if isinstance(part, list) and isinstance(part[0], torch.Tensor)
        else part.to(DEVICE) if isinstance(part, torch.Tensor) else part
        for part in arguments
    ]  # fmt: skip
    expected, found = attention.attend_plainly(*arguments), attend(*placed).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("value_format", FORMATS)
@pytest.mark.parametrize("key_format", ["fp16", "int8-token", "int4-g32-asym"])
def test_pairs_of_formats(key_format, value_format):
    check(call(key_format, value_format, lengths=(100,)))


@pytest.mark.parametrize("key_format", FORMATS)
def test_keys(key_format):
    check(call(key_format, "int4-g32", lengths=(70,), width=80))


def test_several_sequences_windows_and_sinks():
    check(call(lengths=(200, 3), heads=6, key_heads=2, window=70, sinks=True))
    check(call("int4-asym", "int8-asym", lengths=(65,), heads=5, key_heads=1, width=20, query_format="int8-channel"))


def test_nan_reaches_the_heads_that_see_it():
    def change(k, v):
        k[1, 7, 3] = torch.nan

    check(call("int8-asym", "int4-g32", change=change))


def test_unsupported_calls_fall_back_to_the_reference():
    assert stored_of("nf4", 64) is None
    assert stored_of("int3-asym", 64) is None
    check(call("mxfp4", "int8-token"))


def test_it_compiles_for_ampere_ada_and_hopper():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    cases = [("int8-token", "int4-g32-asym", 80), ("int4-asym", "fp16", 89), ("bf16", "int8-asym", 90)]
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    sizes = [line.split() for line in run.stdout.splitlines()]
    assert len(sizes) == 3
    assert all(int(size) > 1000 for size, _ in sizes)
