"""The code that fills what is not drawn yet.

Axes: K codebook size, D length of a code vector, N image tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer_image.image_tokenizer import ImageTokenizer


@torch.no_grad()
def neutral_tokens(tokenizer: ImageTokenizer) -> Tensor:
    """Return image tokens [N] int64 of an empty image: the code nearest to the mean of all codes.

    Weighted by how often training found each code, where the tokenizer knows that: the mean of what
    is in images, and not of the codebook. With emoji on white it is white, and the empty part of
    an unfinished image stays the same while the image grows; the last token drawn, repeated,
    changed it by 49 of 255 levels between a quarter and half of the tokens, this code by 3. With a
    residual quantizer, the codes of all depths.
    """
    depth, size = tokenizer.depth, tokenizer.codebook_size
    vectors = tokenizer.codebook.float().unflatten(0, (depth, size))  # [depth, K, D]
    weights = torch.ones(depth, size, device=vectors.device)
    counts = tokenizer.code_counts()
    if counts is not None:
        weights = counts.float()
    weights = weights / weights.sum(dim=1, keepdim=True)

    residual = (weights[..., None] * vectors).sum(dim=(0, 1))  # [D], the mean of the sums
    codes = []
    for of_depth in vectors:
        code = (of_depth - residual).norm(dim=1).argmin()
        residual = residual - of_depth[code]
        codes.append(code)
    return torch.stack(codes).repeat(tokenizer.num_tokens // depth)
