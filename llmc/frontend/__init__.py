"""Frontend: an unmodified PyTorch model in, a ModelGraph (Relax) out. No code per model."""
