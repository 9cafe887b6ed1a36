"""Benchmarks on one shared harness: `python -m benchmarks NAME [--quick]`; see README.md."""
