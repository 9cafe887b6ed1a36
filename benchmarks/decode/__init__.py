"""`python -m benchmarks decode`: speed and memory of token sampling, ours and peers' in one run."""
