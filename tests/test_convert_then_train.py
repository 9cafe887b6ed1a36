"""A converted checkpoint is trained on: the first loss is the one that the source's own mathematics gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from inference.checkpoints import ConvertOptions, convert
from inference.checkpoints.writing import write_converted
from tests import tiny
from tests.llamagen_reference import Sizes, class_prefix, logits, make_state
from tests.test_init_from import PLAIN, first_loss
from tests.test_init_from import made as made


def test_a_converted_transformer_begins_with_its_sources_loss(made, tmp_path, group):
    names = sorted(tiny.CAPTIONS)
    sizes = Sizes(classes=len(names) + 1)
    state = make_state(sizes)
    torch.save({"model": state}, tmp_path / "c2i.pt")
    (tmp_path / "names.txt").write_text("\n".join(names))
    (tmp_path / "heads.json").write_text('{"n_head": 2}')
    options = ConvertOptions(config=tmp_path / "heads.json", image_tokenizer=made / "tokenizer", classes=tmp_path / "names.txt")
    write_converted(convert("llamagen-gpt", tmp_path / "c2i.pt", options), tmp_path / "c2i.pt", tmp_path / "c2i")
    loss, rows = first_loss(tmp_path / "c2i", made / "tokens", tmp_path / "run", group, *PLAIN, "--model.dropout", 0)
    tokens = torch.from_numpy(rows.image_tokens.astype("int64"))
    prefix = class_prefix(state, torch.tensor([names.index(caption) for caption in rows.captions]))
    theirs = logits(state, sizes, prefix, torch.ones(len(prefix), 1, dtype=torch.bool), tokens[:, :-1])
    expected = float(F.cross_entropy(theirs.transpose(1, 2), tokens))
    print(f"equality: first loss {loss:.6f}, of plain functions {expected:.6f}")
    assert loss == pytest.approx(expected, abs=1e-5)
