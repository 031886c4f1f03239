"""Kernels and schedule rules: TIR builders that passes call, and rules that give any TIR a schedule."""
