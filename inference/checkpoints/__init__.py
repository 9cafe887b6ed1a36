"""Published checkpoints in and out: other projects' weights as Tokenloom folders with equal numbers, and back."""

from inference.checkpoints.convert import KINDS, convert, from_checkpoint
from inference.checkpoints.export import EXPORTS, export_checkpoint
from inference.checkpoints.options import ConvertOptions

__all__ = ["EXPORTS", "KINDS", "ConvertOptions", "convert", "export_checkpoint", "from_checkpoint"]
