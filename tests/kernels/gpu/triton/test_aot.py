"""Compiled code of the kernels for Ampere, Ada and Hopper, without a device."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, torch
from mpq.core.formats import parse_format
from triton_compiler import compile_product
from mpq.kernels.gpu.triton.config import Config, step_cols
from mpq.kernels.gpu.triton.spec import spec_of
facts = []
for name, dtype, capability, mode, *programs in json.loads(sys.argv[1]):
    format = parse_format(name)
    config = Config(block_k=min(64, step_cols(spec_of(format))), programs=sum(programs))
    kernel = compile_product(format, getattr(torch, dtype), config, capability, mode)
    ptx = kernel.asm["ptx"]
    words = ("mma.sync", "wgmma.mma_async", "cp.async.cg", "st.shared", "st.local")
    facts.append({word: ptx.count(word) for word in words} | {"cubin": len(kernel.asm["cubin"])})
print(json.dumps(facts))
"""


def compile_all(cases: list[tuple[str | int, ...]]) -> list[dict[str, int]]:
    """Compile in a separate process: once chosen, the interpreter stays for the whole process."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    facts: list[dict[str, int]] = json.loads(run.stdout.splitlines()[-1])
    return facts


def test_int4_goes_from_registers_to_the_tensor_cores() -> None:
    ampere, hopper = compile_all([("int4-g128", "float16", 80, "float"), ("int4-g128", "bfloat16", 90, "float")])
    assert ampere["mma.sync"] > 0
    assert ampere["cp.async.cg"] > 0  # 16 bytes a thread, in a pipeline
    assert hopper["wgmma.mma_async"] > 0
    assert hopper["cp.async.cg"] > 0
    assert hopper["st.shared"] == 0  # weights go from registers into wgmma: the layout is its own fragment order
    assert ampere["st.local"] == hopper["st.local"] == 0


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_formats_compile(capability: int) -> None:
    names = ["int3-g64-asym", "int8-channel", "fp8-e4m3", "mxfp6-e3m2", "nvfp4", "nf4-g64"]
    types = ["float16", "bfloat16"]
    cases = [(name, types[place % 2], capability, "float") for place, name in enumerate(names)]
    assert all(fact["cubin"] > 0 and fact["st.local"] == 0 for fact in compile_all(cases))


def test_8_bit_inputs_use_8_bit_instructions() -> None:
    cases = [
        ("int4-g128", "float16", 80, "int8"), ("int8-channel", "bfloat16", 90, "int8"),
        ("fp8-e4m3-channel", "float16", 89, "fp8"), ("fp8-e4m3-channel", "bfloat16", 90, "fp8"),
    ]  # fmt: skip
    facts = compile_all(cases)
    assert all(fact["mma.sync"] + fact["wgmma.mma_async"] > 0 and fact["st.local"] == 0 for fact in facts)
    assert facts[1]["st.shared"] == facts[3]["st.shared"] == 0


def test_persistent_programs_keep_pipeline_and_instructions() -> None:
    names = [("int4-g128", 80), ("int4-g128", 89), ("int4-g128", 90), ("nvfp4", 90)]
    facts = compile_all([(name, "bfloat16", capability, "float", 132) for name, capability in names])
    ampere, ada, hopper, _ = facts
    assert all(fact["mma.sync"] > 0 and fact["cp.async.cg"] > 0 for fact in (ampere, ada))
    assert hopper["wgmma.mma_async"] > 0
    assert hopper["cp.async.cg"] > 0
    assert all(fact["st.local"] == 0 for fact in facts)
