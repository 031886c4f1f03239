"""TVM's CUDA runtime and llmc's on a machine without a GPU: see fake_cuda.c and device.py."""
