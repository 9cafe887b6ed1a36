"""What every package shares: errors with exit codes, strict configs, safe files, progress. Knows no model."""
