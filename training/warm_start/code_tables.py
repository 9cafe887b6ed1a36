"""Start the transformer's tables of image codes from the image tokenizer's codebook."""

# Axes: K codes, d numbers of a code vector, F features, D width

from __future__ import annotations

import torch
from torch import Tensor

from seq2seq import ImageTransformer
from tokenizer_image import ImageTokenizer
from tokenloom_common.errors import UserError

SCALE = 0.022
"""Standard deviation that a table's shared part begins with, near that of a table drawn freely."""
FEW_VALUES = 16
"""Numbers of code vectors with at most so many values are levels (FSQ, LFQ), with any relation."""


def has_vector_per_code(image_tokenizer: ImageTokenizer) -> bool:
    """Whether each code has one code vector; a residual quantizer's has one for each depth."""
    return len(image_tokenizer.codebook) == image_tokenizer.codebook_size


def check_code_tables(image_tokenizer: ImageTokenizer) -> None:
    """Raise UserError for a tokenizer whose codebook has not one vector for each code."""
    vectors, codes = len(image_tokenizer.codebook), image_tokenizer.codebook_size
    if not has_vector_per_code(image_tokenizer):
        raise UserError(f"code_tables_from_codebook: the image tokenizer has {vectors:,} code "
                        f"vectors for {codes:,} codes, as a residual quantizer has; leave it out")


@torch.no_grad()
def start_code_tables(model: ImageTransformer, image_tokenizer: ImageTokenizer) -> None:
    """Redraw the input and output table of image codes so that codes of like vectors begin alike.

    A table [K, D] is a random projection of the codes' features, plus half of what it was, so that
    no two codes are equal.
    """
    features = code_features(image_tokenizer.codebook)
    for table in (model.image_embedding.weight, model.to_logits.weight):
        projection = torch.randn(features.shape[1], table.shape[1])
        table.copy_(table / 2 + SCALE * (features @ projection).to(table))


def code_features(codebook: Tensor) -> Tensor:
    """Code vectors [K, d] -> features [K, F] float32, of length 1 on average (root mean square).

    Numbers are standardised; those of few values become one feature for each value.
    """
    columns = []
    for column in codebook.detach().float().cpu().unbind(dim=1):
        values, index = column.unique(return_inverse=True)
        if len(values) <= FEW_VALUES:
            columns.append(torch.nn.functional.one_hot(index, len(values)).float())
        else:
            columns.append(((column - column.mean()) / column.std())[:, None])
    features = torch.cat(columns, dim=1)
    return features / features.square().sum(dim=1).mean().sqrt()
