"""Start a run from trained models."""
