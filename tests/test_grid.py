"""tokenizer_image/grid.py: folding and unfolding."""

import pytest
import torch

from tokenizer_image.grid import codes_to_tokens, tokens_to_codes


def test_codes_to_tokens_to_codes_is_exact_for_an_oblong_grid():
    codes = torch.arange(2 * 3 * 5).view(2, 3, 5)
    tokens = codes_to_tokens(codes)
    assert tokens.shape == (2, 15)
    assert torch.equal(tokens_to_codes(tokens, (3, 5)), codes)


def test_tokens_run_row_by_row():
    codes = torch.tensor([[[1, 2], [3, 4]]])
    assert codes_to_tokens(codes).tolist() == [[1, 2, 3, 4]]
    assert tokens_to_codes(torch.tensor([[1, 2, 3, 4]]), (2, 2)).tolist() == codes.tolist()


@pytest.mark.parametrize("shape", [(2, 14), (15,), (1, 3, 5)])
def test_tokens_that_do_not_fill_the_grid_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[B, 15\] for a grid of 3 x 5"):
        tokens_to_codes(torch.zeros(shape, dtype=torch.int64), (3, 5))


def test_codes_without_a_batch_axis_are_refused():
    with pytest.raises(ValueError, match=r"\[B, h, w\]"):
        codes_to_tokens(torch.zeros(3, 5, dtype=torch.int64))
