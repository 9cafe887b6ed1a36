"""The objective of caption -> image tokens."""

from __future__ import annotations

from seq2seq import (
    TransformerConfig,
)
from tokenloom_common.errors import UserError
from training.config.seq2seq import Seq2SeqRunConfig


def check_losses(config: Seq2SeqRunConfig, model: TransformerConfig) -> None:
    """UserError for a weight of something that the model does not have."""
    if model.layout_grid is None and config.loss.region_weights:
        raise UserError("loss.region_weights weigh image tokens by their layout, and this run has none: the token shards need "
                        "a layout (encode_dataset's layout.kind) and use_layout true")
    classes = model.layout_classes or 0
    wrong = [name for name in config.loss.region_weights if not 0 <= name < classes]
    if wrong:
        raise UserError(f"loss.region_weights names layout class {wrong[0]}; the layout has 0 to {classes - 1}")
