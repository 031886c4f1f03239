"""Graph passes: ModelGraph to StepModule. One pass, one file; the order is in llmc/passes/order.py."""
