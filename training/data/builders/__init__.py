"""Build captioned data sets: emoji, shapes, scenes."""
