"""Triton kernels of a decode step, for GPUs. Importing this package does not need triton; each of
its modules does.

They compile on first use. With TRITON_INTERPRET=1 set before triton is imported they run on a CPU
instead, slowly: that is how they are tested where there is no GPU.
"""
