"""One training objective per script, shared with the memory plan."""
