"""torch.ops.mpq.linear on CPUs without Python: src/torch_dispatch.c, called by PyTorch's dispatcher.

Streaming weights evicts Python's code from the caches; its share of a call then takes as long as reading 1 MB of
weights. The library does not link to PyTorch: it gets the functions of PyTorch's stable C interface by address. PyTorch
before 2.13 lacks some of them; there, and for calls that C does not handle, Python computes (torch.ops.mpq.linear_any).
"""

import ctypes
import logging
from pathlib import Path

import torch

_FUNCTIONS = (  # in the order of src/torch_dispatch.c
    "aoti_torch_library_init_impl", "aoti_torch_library_impl", "aoti_torch_call_dispatcher", "aoti_torch_check",
    "torch_exception_get_what_without_backtrace", "torch_list_size", "torch_list_get_item", "torch_string_c_str",
    "aoti_torch_get_data_ptr", "aoti_torch_get_dim", "aoti_torch_get_sizes", "aoti_torch_get_strides",
    "aoti_torch_get_dtype", "aoti_torch_empty_strided", "torch_get_num_threads", "aoti_torch_delete_tensor_object",
    "torch_delete_list", "torch_delete_string", "torch_delete_stable_ivalue", "aoti_torch_dtype_float32",
    "aoti_torch_dtype_bfloat16", "aoti_torch_device_type_cpu",
)  # fmt: skip
_log = logging.getLogger(__name__)


def serve(library: ctypes.CDLL, level: int, parallel: int) -> bool:
    """Register the library as torch.ops.mpq.linear's CPU kernel at a level; False if this PyTorch lacks a function."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*")):
        try:
            offered = ctypes.CDLL(str(path))
            addresses = [ctypes.cast(getattr(offered, name), ctypes.c_void_p).value for name in _FUNCTIONS]
        except (OSError, AttributeError):
            continue
        interface = (ctypes.c_void_p * len(addresses))(*addresses)
        return bool(library.mpq_serve(interface, level, ctypes.c_void_p(parallel)) == 0)
    _log.debug(
        "PyTorch %s lacks functions of the stable C interface: kernels are called through Python", torch.__version__
    )
    return False
