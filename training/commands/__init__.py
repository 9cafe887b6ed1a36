"""The training side's commands: data, evaluate, estimate, runs, report."""
