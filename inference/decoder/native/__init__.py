"""A decoder step on the CPU as code compiled by Numba, run on PyTorch's own threads."""
