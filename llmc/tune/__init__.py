"""The auto-tuner: finds fast schedules for the kernels of a model on the machine at hand."""
