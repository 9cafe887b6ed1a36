"""Published checkpoints in and out: other projects' weights as Tokenloom folders with equal numbers, and back."""

from inference.checkpoints.kinds import KINDS, ConvertOptions, convert, from_checkpoint

__all__ = ["KINDS", "ConvertOptions", "convert", "from_checkpoint"]
