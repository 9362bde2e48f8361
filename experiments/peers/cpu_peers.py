"""Other libraries' low-bit products on a CPU, each in a separate process and environment.

    PYTHON -m experiments.peers.cpu_peers NAME ROWS COLS COPIES THREADS

The process builds COPIES weights with random codes, prints "ready", and answers every line "BATCH" with the mean
seconds of a call over all copies. It sleeps between lines.
"""

import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
# by library: the folder of its environment, and what is installed there
TOGETHER = ("/tmp/peer-cpu", "torch==2.13.0", "numpy", "onnx", "onnxruntime", "openvino", "bitsandbytes")
ENVIRONMENTS = {
    "llama.cpp": ("/tmp/peer-llama-native", "llama-cpp-python"),
    "onnxruntime-genai": (
        "/tmp/peer-genai", "onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch==2.13.0", "transformers",
    ),
}  # fmt: skip
# The instructions that GGML_NATIVE would choose on the benchmark machine. GCC 12 drops the stores that _tile_loadconfig
# reads, and ggml's AMX then dies with "illegal instruction": keep dead stores.
LLAMA_SETS = "AVX AVX2 FMA F16C BMI2 AVX_VNNI AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16 AMX_TILE AMX_INT8 AMX_BF16"
LLAMA_BUILD = "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DGGML_NATIVE=OFF '-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse' "
LLAMA_BUILD += " ".join(f"-DGGML_{name}=ON" for name in LLAMA_SETS.split())
# By our format: the peers' formats with codes of as many bits and the same kind of grid, whatever their groups.
# llama.cpp's blocks of 32 and super-blocks of 256 store more scales: q4_0 and q4_K 4.5 bits to our 4.25 (int4-g64) or
# 4.125 (int4-g128), q2_K 2.625 to 2.125, q3_K 3.4375 to 3.125, q5_K 5.5 to 5.125, q6_K 6.5625 to 6.125, q8_0 8.5 to 8.
# iq4_nl has a fixed table of 16 levels, like nf4. No peer has fp6; only OpenVINO has fp8.
PEERS = {
    "int4-g128": (
        "onnxruntime:4-128", "openvino:i4", "openvino:u4", "torch:int4pack", "llama.cpp:q4_0", "llama.cpp:q4_K",
    ),
    "int4-g32": ("onnxruntime:4-32", "llama.cpp:q4_0", "llama.cpp:q4_K"),
    "int8-channel": (
        "onnxruntime:8-128", "openvino:i8", "torch:int8pack", "torch:dynamic", "bitsandbytes:int8", "llama.cpp:q8_0",
    ),
    "int2-g128": ("onnxruntime:2-128", "openvino:u2", "llama.cpp:q2_K"),
    "int3-g128": ("llama.cpp:q3_K",),
    "int5-g128": ("llama.cpp:q5_0", "llama.cpp:q5_K"),
    "int6-g128": ("llama.cpp:q6_K",),
    "nf4-g64": ("bitsandbytes:nf4", "openvino:nf4", "llama.cpp:iq4_nl"),
    "mxfp4": ("openvino:f4e2m1", "llama.cpp:mxfp4"),
    "nvfp4": ("llama.cpp:nvfp4",),
    "fp8-e4m3-channel": ("openvino:f8e4m3",),
}  # fmt: skip


def environment(library: str) -> Path:
    """A peer's interpreter; builds its environment if missing (minutes, about 1 GB)."""
    folder, *packages = ENVIRONMENTS.get(library, TOGETHER)
    python = Path(folder) / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        command = [str(python), "-m", "pip", "install", "-q", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
        subprocess.run([*command, *packages], env={**os.environ, "CMAKE_ARGS": LLAMA_BUILD}, check=True)
    return python


def product(name: str, rows: int, cols: int, copies: int, threads: int) -> "Peer":
    """A worker that times products."""
    return Peer(name, "cpu_peers", name, rows, cols, copies, threads)


class Peer:
    """A persistent worker process: a module of this folder, in the library's environment."""

    def __init__(self, name: str, module: str, *arguments: object, python: str | None = None) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python or environment(name.partition(":")[0]), "-m", f"experiments.peers.{module}", *map(str, arguments)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def ready(self) -> bool:
        """Wait until the worker has started or failed; return whether it started."""
        return self._line() == "ready"

    def answer(self, question: int | str) -> list[float]:
        """The worker's measurement for one request; NaN once it has failed."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{question}\n")
            self.process.stdin.flush()
            return [float(word) for word in (self._line() or "nan").split()]
        except OSError:
            return [float("nan")]

    def close(self) -> None:
        """Stop the worker."""
        self.process.kill()
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # skip what libraries print
            if line.startswith("> "):
                return line[2:].strip()
        return ""


def onnxruntime_pass(kind: str, rows: int, cols: int, copies: int, threads: int) -> Callable[[int], object]:
    """MatMulNBits with int8 activations (accuracy_level 4), all copies in one graph; `kind` is bits-block."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    (bits, block), random = map(int, kind.split("-")), np.random.default_rng(0)
    blocks = -(-cols // block)
    nodes, weights, outputs = [], [], []
    for i in range(copies):
        codes = random.integers(0, 256, (rows, blocks, block * bits // 8), dtype=np.uint8)
        scales = np.full((rows, blocks), 0.01, np.float32)
        weights += [numpy_helper.from_array(codes, f"codes{i}"), numpy_helper.from_array(scales, f"scales{i}")]
        nodes.append(helper.make_node(
            "MatMulNBits", ["x", f"codes{i}", f"scales{i}"], [f"y{i}"], domain="com.microsoft",
            K=cols, N=rows, bits=bits, block_size=block, accuracy_level=4,
        ))  # fmt: skip
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["tokens", rows]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", cols])]
    graph = helper.make_graph(nodes, "copies", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # after a run, not within it
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    xs: dict[int, object] = {}

    def run(batch: int) -> object:
        if batch not in xs:
            xs[batch] = random.standard_normal((batch, cols), dtype=np.float32)
        return session.run(None, {"x": xs[batch]})

    return run


def openvino_pass(kind: str, rows: int, cols: int, copies: int, threads: int) -> Callable[[int], object]:
    """OpenVINO's products with compressed weights, all copies in one graph."""
    import numpy as np
    import openvino
    import openvino.opset13 as op

    types = {"i4": openvino.Type.i4, "u4": openvino.Type.u4, "i8": openvino.Type.i8, "u2": openvino.Type.u2,
             "nf4": openvino.Type.nf4, "f4e2m1": openvino.Type.f4e2m1, "f8e4m3": openvino.Type.f8e4m3}  # fmt: skip
    block = {"i4": 128, "u4": 128, "u2": 128, "nf4": 64, "f4e2m1": 32}.get(kind, 0)
    type, random = types[kind], np.random.default_rng(0)
    shape, groups = ([rows, cols // block, block], [rows, cols // block, 1]) if block else ([rows, cols], [rows, 1])
    x = op.parameter([-1, cols], np.float32)
    products, kept = [], []  # keep the arrays: constants share their memory
    for _ in range(copies):
        codes = random.integers(0, 127, rows * cols * type.bitwidth // 8, dtype=np.uint8)
        kept.append((codes, openvino.Tensor(codes, openvino.Shape(shape), type)))
        weight = op.convert(op.constant(kept[-1][1]), "f32")
        if kind in ("u4", "u2"):
            zeros = np.full(int(np.prod(groups)) * type.bitwidth // 8, 0x88 if kind == "u4" else 0xAA, np.uint8)
            kept.append((zeros, openvino.Tensor(zeros, openvino.Shape(groups), type)))
            weight = op.subtract(weight, op.convert(op.constant(kept[-1][1]), "f32"))
        weight = op.multiply(weight, op.convert(op.constant(np.full(groups, 0.01, np.float16)), "f32"))
        if block:
            weight = op.reshape(weight, np.array([rows, cols]), False)
        products.append(op.matmul(x, weight, False, True))
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    compiled = core.compile_model(openvino.Model(products, [x]), "CPU", settings)
    request = compiled.create_infer_request()
    xs: dict[int, object] = {}

    def run(batch: int) -> object:
        if batch not in xs:
            xs[batch] = random.standard_normal((batch, cols), dtype=np.float32)
        request.infer({0: xs[batch]}, share_outputs=True)
        return kept, core, compiled

    return run


def torch_pass(kind: str, rows: int, cols: int, copies: int, threads: int) -> Callable[[int], object]:
    """PyTorch's own kernels for packed weights: int4 and int8 with bfloat16 activations, or dynamic int8."""
    import torch

    torch.set_num_threads(threads)
    aten, dtype = torch.ops.aten, torch.float32 if kind == "dynamic" else torch.bfloat16
    products: list[Callable[[torch.Tensor], object]] = []
    for _ in range(copies):
        if kind == "int4pack":
            codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
            packed = aten._convert_weight_to_int4pack_for_cpu(codes, 2)
            scales = torch.rand(cols // 128, rows, 2).to(dtype)
            products.append(lambda x, w=packed, s=scales: aten._weight_int4pack_mm_for_cpu(x, w, 128, s))
        elif kind == "int8pack":
            codes, scales = torch.randint(-127, 128, (rows, cols), dtype=torch.int8), torch.rand(rows).to(dtype)
            products.append(lambda x, codes=codes, scales=scales: aten._weight_int8pack_mm(x, codes, scales))
        else:
            products.append(torch.ao.nn.quantized.dynamic.Linear(cols, rows))
    return _calls(products, cols, dtype)


def bitsandbytes_pass(kind: str, rows: int, cols: int, copies: int, threads: int) -> Callable[[int], object]:
    """Linear4bit in groups of 64, or Linear8bitLt; bfloat16 activations."""
    import bitsandbytes
    import torch

    torch.set_num_threads(threads)
    nn, layers = bitsandbytes.nn, []
    for _ in range(copies):
        if kind == "int8":
            layer = nn.Linear8bitLt(cols, rows, bias=False, has_fp16_weights=False)
        else:
            layer = nn.Linear4bit(
                cols, rows, bias=False, compute_dtype=torch.bfloat16, quant_type=kind, compress_statistics=False
            )
        layers.append(layer.to("cpu").eval())
    return _calls(layers, cols, torch.float16 if kind == "int8" else torch.bfloat16)


def llama_pass(kind: str, rows: int, cols: int, copies: int, threads: int) -> Callable[[int], object]:
    from experiments.peers.peer_ggml import Products  # the environment has only numpy

    return Products(kind, rows, cols, copies, threads).run


def _calls(products, cols, dtype):  # type: ignore[no-untyped-def]
    import torch

    xs = {}

    def run(batch: int) -> None:
        if batch not in xs:
            xs[batch] = torch.randn(batch, cols).to(dtype)
        with torch.inference_mode():
            for product in products:
                product(xs[batch])

    return run


PASSES = {
    "onnxruntime": onnxruntime_pass, "openvino": openvino_pass, "torch": torch_pass, "bitsandbytes": bitsandbytes_pass,
    "llama.cpp": llama_pass,
}  # fmt: skip


def work(name: str, rows: int, cols: int, copies: int, threads: int) -> None:
    library, _, kind = name.partition(":")
    run = PASSES[library](kind, rows, cols, copies, threads)
    run(1)
    print("> ready", flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        run(int(line))
        print(f"> {(time.perf_counter() - started) / copies}", flush=True)


if __name__ == "__main__":
    work(sys.argv[1], *map(int, sys.argv[2:]))
