"""Shared by every package, without models: errors with exit codes, strict configs, safe files."""
