"""Captioned images: sources, builders of real and synthetic sets, token shards, a run's visits."""
