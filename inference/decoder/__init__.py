"""The serving decoder: prefill, cached steps, fused weights, KV cache."""
