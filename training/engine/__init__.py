"""The distributed engine: DeepSpeed, processes, signals, optimizers."""
