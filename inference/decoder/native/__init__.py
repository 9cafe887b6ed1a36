"""A decoder's step on the CPU as compiled code, on PyTorch's own threads."""
