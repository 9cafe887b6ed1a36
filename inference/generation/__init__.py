"""Token generation: plain, Jacobi, CUDA graphs, continuous batching. Knows tokens, not pixels."""
