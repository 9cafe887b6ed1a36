"""Configs of the training scripts: defaults < YAML recipe < command line."""
