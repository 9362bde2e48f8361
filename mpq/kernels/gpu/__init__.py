"""The GPU kernels of torch.ops.mpq: Triton and CUDA C++."""
