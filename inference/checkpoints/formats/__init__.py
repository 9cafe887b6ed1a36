"""One module per foreign checkpoint format."""
