"""Data as a run visits it: the order of items, one visit of an item, batches and their loader."""
