"""Published checkpoints, in and out: other projects' weights as Tokenloom folders, and back."""

from inference.checkpoints.convert import convert, from_checkpoint
from inference.checkpoints.export import EXPORTERS, export_checkpoint
from inference.checkpoints.options import ConvertOptions
from inference.conversions import CHECKPOINT_KINDS

__all__ = ["CHECKPOINT_KINDS", "EXPORTERS", "ConvertOptions", "convert", "export_checkpoint",
           "from_checkpoint"]
