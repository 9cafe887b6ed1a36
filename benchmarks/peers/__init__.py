"""Other projects' samplers and tokenizers, wrapped for the benchmarks."""
