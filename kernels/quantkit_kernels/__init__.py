"""Quantized linear algebra on tensors: every op with its schema, its reference and its fast paths."""
