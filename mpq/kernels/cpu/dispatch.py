"""torch.ops.mpq.linear on CPUs without Python: native/dispatch.h, called by PyTorch's dispatcher.

A weight that streams by leaves the caches empty, and Python's part of a call then takes as long as 1 MB of weights. The
library is not linked to PyTorch: it is given the functions of PyTorch's stable C interface by address. PyTorch before
2.13 lacks some of them; there, and for calls that are not plain, Python computes (torch.ops.mpq.linear_any).
"""

import ctypes
import logging
from pathlib import Path

import torch

_FUNCTIONS = (  # in the order of native/dispatch.h
    "aoti_torch_library_init_impl", "aoti_torch_library_impl", "aoti_torch_call_dispatcher", "aoti_torch_check",
    "torch_exception_get_what_without_backtrace", "torch_list_size", "torch_list_get_item", "torch_string_c_str",
    "aoti_torch_get_data_ptr", "aoti_torch_get_dim", "aoti_torch_get_sizes", "aoti_torch_get_strides",
    "aoti_torch_get_dtype", "aoti_torch_empty_strided", "torch_get_num_threads", "aoti_torch_delete_tensor_object",
    "torch_delete_list", "torch_delete_string", "torch_delete_stable_ivalue", "aoti_torch_dtype_float32",
    "aoti_torch_dtype_bfloat16", "aoti_torch_device_type_cpu",
)  # fmt: skip
_log = logging.getLogger(__name__)


def serve(library: ctypes.CDLL, level: int, parallel: int) -> bool:
    """Have the library compute torch.ops.mpq.linear's plain calls at that level; False if this PyTorch cannot."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*")):
        try:
            offered = ctypes.CDLL(str(path))
            addresses = [ctypes.cast(getattr(offered, name), ctypes.c_void_p).value for name in _FUNCTIONS]
        except (OSError, AttributeError):
            continue
        interface = (ctypes.c_void_p * len(addresses))(*addresses)
        return bool(library.mpq_serve(interface, level, ctypes.c_void_p(parallel)) == 0)
    _log.debug("PyTorch %s offers too little of its stable C interface: Python calls the kernels", torch.__version__)
    return False
