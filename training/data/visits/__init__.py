"""What a training step reads: order, loader, samples, collation."""
