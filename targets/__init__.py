"""Targets: one folder each, a frozen BACKEND manifest, loaded on first use."""
