"""The training loop: command line, steps, logging."""
