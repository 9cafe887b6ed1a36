"""Tables of image codes that begin with the codebook's likenesses (code_tables_from_codebook)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tokenloom_common.errors import UserError
from training.warm_start.code_tables import SCALE, check_code_tables, code_features, start_code_tables


def levels_of_codes(levels: tuple[int, ...]) -> torch.Tensor:
    """Vectors of an FSQ codebook in [-1, 1], written from its definition."""
    grids = torch.meshgrid(*[torch.linspace(-1, 1, count) for count in levels], indexing="ij")
    return torch.stack([grid.flatten() for grid in grids], dim=1)


def test_codes_are_as_alike_as_the_levels_they_share():
    codebook = levels_of_codes((7, 5, 5))
    features = code_features(codebook)
    assert features.shape == (175, 7 + 5 + 5)
    shared = (codebook[:, None] == codebook[None]).sum(dim=2)
    torch.testing.assert_close(features @ features.T, shared / 3)


def test_learned_vectors_are_standardised():
    torch.manual_seed(0)
    codebook = torch.randn(50, 4) * torch.tensor([1.0, 10.0, 0.1, 3.0]) + 5
    features = code_features(codebook)
    expected = (codebook - codebook.mean(0)) / codebook.std(0)
    torch.testing.assert_close(features / features.norm(), expected / expected.norm())
    assert features.square().sum(dim=1).mean() == pytest.approx(1.0)


def test_both_tables_follow_the_codebook_and_nothing_else_changes():
    tokenizer = tiny.vqgan()
    model = tiny.seq2seq()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    start_code_tables(model, tokenizer)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"image_embedding.weight", "to_logits.weight"}
    for name in changed:
        new = model.state_dict()[name] - before[name] / 2
        assert new.square().mean().sqrt() == pytest.approx(SCALE, rel=0.2)
        # a random projection keeps angles, up to the width's noise
        wanted = F.normalize(code_features(tokenizer.codebook), dim=1)
        found = F.normalize(new, dim=1)
        assert torch.corrcoef(torch.stack([(wanted @ wanted.T).flatten(), (found @ found.T).flatten()]))[0, 1] > 0.85


def test_a_residual_codebook_is_refused():
    with pytest.raises(UserError, match="64 code vectors for 32 codes"):
        check_code_tables(tiny.vqgan(quantizer={"kind": "residual", "depth": 2}))
    check_code_tables(tiny.vqgan())
