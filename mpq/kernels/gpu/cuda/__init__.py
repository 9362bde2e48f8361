"""CUDA C++ kernels: sources as package data, compiled on the user's machine by NVRTC, launched through the driver."""
