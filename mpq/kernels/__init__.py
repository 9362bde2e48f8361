"""Low-bit kernels behind torch.ops.mpq: each op defined once, with a plain-PyTorch reference."""
