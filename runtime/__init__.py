"""The thin runtime: loads an artifact and makes tokens. Needs no torch, no transformers, no compiler code."""
