"""Readers of untrusted weight files: PyTorch, safetensors, msgpack."""
