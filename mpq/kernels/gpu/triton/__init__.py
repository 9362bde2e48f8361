"""Triton kernels over the layout "fragments": one matrix product for every format, driven by the format's data."""
