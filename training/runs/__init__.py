"""Run folders: checkpoints, random state, metrics, reports, cards."""
