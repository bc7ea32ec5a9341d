"""Numba kernels for float32 on a CPU; each has a plain version in torch beside it."""
