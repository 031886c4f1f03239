"""Weight quantization: named schemes, the canonical form of a quantized weight, and the methods that make one."""
