"""ggml's products of quantized weights, through ctypes on the libraries inside llama-cpp-python; run by cpu_peers.py.

Weights are placed where llama.cpp would load them: in the first of the CPU's extra buffers that can multiply them,
which repacks them, otherwise as in the file.
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import numpy as np

FLOAT = 0
TYPES = {
    "q4_0": 2, "q5_0": 6, "q8_0": 8, "q2_K": 10, "q3_K": 11, "q4_K": 12, "q5_K": 13, "q6_K": 14, "iq4_nl": 20,
    "mxfp4": 39, "nvfp4": 40,
}  # fmt: skip
POINTER, LONG, INT, SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_size_t


class Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("size", SIZE), ("memory", POINTER), ("no_alloc", ctypes.c_bool))


SIGNATURES = {
    "ggml_init": (POINTER, Parameters),
    "ggml_free": (None, POINTER),
    "ggml_nbytes": (SIZE, POINTER),
    "ggml_row_size": (SIZE, INT, LONG),
    "ggml_new_tensor_2d": (POINTER, POINTER, INT, LONG, LONG),
    "ggml_mul_mat": (POINTER, POINTER, POINTER, POINTER),
    "ggml_quantize_chunk": (SIZE, INT, POINTER, POINTER, LONG, LONG, LONG, POINTER),
    "ggml_new_graph_custom": (POINTER, POINTER, SIZE, ctypes.c_bool),
    "ggml_graph_overhead_custom": (SIZE, SIZE, ctypes.c_bool),
    "ggml_tensor_overhead": (SIZE,),
    "ggml_build_forward_expand": (None, POINTER, POINTER),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, POINTER, POINTER),
    "ggml_backend_buffer_free": (None, POINTER),
    "ggml_backend_buft_name": (ctypes.c_char_p, POINTER),
    "ggml_backend_buft_alloc_buffer": (POINTER, POINTER, SIZE),
    "ggml_backend_buffer_get_base": (POINTER, POINTER),
    "ggml_backend_tensor_alloc": (INT, POINTER, POINTER, POINTER),
    "ggml_backend_tensor_set": (None, POINTER, POINTER, SIZE, SIZE),
    "ggml_backend_tensor_get": (None, POINTER, POINTER, SIZE, SIZE),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, POINTER, POINTER),
    "ggml_backend_dev_buffer_type": (POINTER, POINTER),
    "ggml_backend_dev_backend_reg": (POINTER, POINTER),
    "ggml_backend_reg_get_proc_address": (POINTER, POINTER, ctypes.c_char_p),
    "ggml_backend_get_device": (POINTER, POINTER),
    "ggml_backend_graph_compute": (INT, POINTER, POINTER),
    "ggml_backend_cpu_init": (POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, POINTER, INT),
}


class Ggml:
    """The functions of SIGNATURES as attributes, without their prefix, and a CPU backend of some threads."""

    def __init__(self, threads: int) -> None:
        spec = find_spec("llama_cpp")
        assert spec is not None, "llama-cpp-python is not in this environment"
        folder = Path(str(spec.origin)).parent / "lib"
        libraries = [ctypes.CDLL(str(folder / f"libggml{part}.so"), ctypes.RTLD_GLOBAL) for part in ("-base", "-cpu")]
        for name, (result, *arguments) in SIGNATURES.items():
            function = next(getattr(one, name) for one in libraries if hasattr(one, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.backend = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.backend, threads)
        self.device = self.backend_get_device(self.backend)
        self.plain = self.backend_dev_buffer_type(self.device)

    def context(self, tensors: int) -> int:
        """Room for the descriptions of tensors and of a graph of them."""
        size = tensors * self.tensor_overhead() + self.graph_overhead_custom(tensors, False)
        return self.init(Parameters(size + 2**16, None, True))

    def extra_buffer_types(self) -> list[int]:
        """In llama.cpp's order."""
        registry = self.backend_dev_backend_reg(self.device)
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)(self.device) if address else None
        found: list[int] = []
        while listed and listed[len(found)]:
            found.append(listed[len(found)])
        return found

    def buffer_type(self, kind: int, rows: int, cols: int, without: str = "") -> int:
        """The buffer type that llama.cpp would choose for such a weight, ignoring the buffer of that name."""
        for one in self.extra_buffer_types():
            if self.backend_buft_name(one).decode() == without:
                continue
            context, other = self.context(1), self.context(3)
            weight = self.new_tensor_2d(context, kind, cols, rows)
            buffer = self.backend_alloc_ctx_tensors_from_buft(context, one)
            product = self.mul_mat(other, weight, self.new_tensor_2d(other, FLOAT, cols, 512))
            multiplies = self.backend_dev_supports_op(self.device, product)
            self.backend_buffer_free(buffer)
            self.free(context)
            self.free(other)
            if multiplies:
                return one
        return self.plain


def quantized(ggml: Ggml, kind: int, dense: np.ndarray) -> np.ndarray:
    """A float32 matrix quantized by ggml, as bytes."""
    rows, cols = dense.shape
    out = np.empty((rows, ggml.row_size(kind, cols)), np.uint8)
    ggml.quantize_chunk(kind, dense.ctypes.data, out.ctypes.data, 0, rows, cols, None)
    return out


class Products:
    """Copies of a weight, and for each batch size a graph of their products with an input."""

    def __init__(self, kind: str, rows: int, cols: int, copies: int, threads: int) -> None:
        self.ggml = ggml = Ggml(threads)
        name, _, without = kind.partition("-")
        self.shape, self.random, number = (rows, cols), np.random.default_rng(0), TYPES[name]
        some = self.random.standard_normal((min(rows, 256), cols), dtype=np.float32)  # rounding is slow: rows repeat
        self.dense = np.resize(some, (rows, cols))
        data = np.resize(quantized(ggml, number, some), (rows, ggml.row_size(number, cols)))
        context, place = ggml.context(copies), ggml.buffer_type(number, rows, cols, without)
        self.place = ggml.backend_buft_name(place).decode()
        self.weights = [ggml.new_tensor_2d(context, number, cols, rows) for _ in range(copies)]
        assert ggml.backend_alloc_ctx_tensors_from_buft(context, place)
        for weight in self.weights:
            ggml.backend_tensor_set(weight, data.ctypes.data, 0, data.nbytes)
        self.graphs: dict[int, tuple[int, int, np.ndarray]] = {}

    def run(self, batch: int) -> None:
        """Compute all products; results overwrite each other, as in a model's buffers."""
        if batch not in self.graphs:
            self.graphs[batch] = self._graph(batch)
        status = self.ggml.backend_graph_compute(self.ggml.backend, self.graphs[batch][0])
        assert status == 0, status

    def _graph(self, batch: int) -> tuple[int, int, np.ndarray]:
        ggml, (rows, cols), count = self.ggml, self.shape, len(self.weights)
        values = self.random.standard_normal((batch, cols), dtype=np.float32)
        context, inputs = ggml.context(2 * count), ggml.context(1)
        x = ggml.new_tensor_2d(inputs, FLOAT, cols, batch)
        assert ggml.backend_alloc_ctx_tensors_from_buft(inputs, ggml.plain)
        ggml.backend_tensor_set(x, values.ctypes.data, 0, values.nbytes)
        out = ggml.backend_buft_alloc_buffer(ggml.plain, rows * batch * 4 + 64)
        graph, y = ggml.new_graph_custom(context, 2 * count, False), 0
        for weight in self.weights:
            y = ggml.mul_mat(context, weight, x)
            ggml.backend_tensor_alloc(out, y, ggml.backend_buffer_get_base(out))
            ggml.build_forward_expand(graph, y)
        return graph, y, values

    def error(self, batch: int) -> float:
        """Relative error of the last product against the unrounded weights."""
        self.run(batch)
        _, y, values = self.graphs[batch]
        found = np.empty((batch, self.shape[0]), np.float32)
        self.ggml.backend_tensor_get(y, found.ctypes.data, 0, found.nbytes)
        wanted = values @ self.dense.T
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
