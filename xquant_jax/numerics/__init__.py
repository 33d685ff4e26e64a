"""The arithmetic that everything else is made of: packing, quantization, RoPE, attention in parts."""
