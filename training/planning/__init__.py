"""Plan a run before it starts: memory, arithmetic, time."""
