"""The compiled C kernels of torch.ops.mpq, called through ctypes."""
