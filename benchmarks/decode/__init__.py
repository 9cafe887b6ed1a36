"""`python -m benchmarks decode`: token sampling speed and memory, ours beside each peer's in one run."""
