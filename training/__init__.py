"""Captioned images and models -> a trained model folder."""
