"""Captioned images: readers of every source, builders of real and synthetic sets, and a check before training."""
