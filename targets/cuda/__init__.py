"""The cuda target: NVIDIA GPUs through TVM's CUDA source, assembled ahead of time; no GPU is needed to compile."""
