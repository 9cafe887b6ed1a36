"""What a training run will take: memory, arithmetic, time."""
