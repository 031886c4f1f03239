"""Kernels for machines with blocks, warps and shared memory (Capabilities.simt)."""
