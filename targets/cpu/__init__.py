"""The cpu target: x86-64 and aarch64 through LLVM."""
