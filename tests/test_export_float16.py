"""`tokenloom export float16`: half the size on disk, the same model up to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tokenloom
from inference import TextToImage
from tests import tiny
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom import export_checkpoint, load_tokenizer
from tokenloom_common.errors import UserError
from tokenloom_common.weights import read_tensors


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_a_model_takes_half_the_size_and_its_tensors_are_rounded(tmp_path):
    source = tiny.model_folder(tmp_path / "source")
    out = export_checkpoint("float16", source, tmp_path / "half")
    assert size(out) < 0.6 * size(source)  # headers and counts of codes are not halved
    assert (out / "README.md").read_text() == (source / "README.md").read_text()

    for part in ("seq2seq", "tokenizer_image"):
        before, after = read_tensors(source / part), read_tensors(out / part)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            expected = tensor.half() if tensor.is_floating_point() else tensor
            assert torch.equal(after[name], expected), name


def test_the_rounded_model_loads_in_float32_and_knows_its_own_tokenizer(tmp_path):
    out = export_checkpoint("float16", tiny.model_folder(tmp_path / "source"), tmp_path / "half")
    model = TextToImage.from_pretrained(out, "cpu")
    assert model.seq2seq.image_embedding.weight.dtype == torch.float32
    assert model.seq2seq.config.tokenizer_fingerprint == code_fingerprint(model.image_tokenizer)
    again = export_checkpoint("float16", out, tmp_path / "again")  # rounding twice changes nothing
    assert all((again / path.relative_to(out)).read_bytes() == path.read_bytes()
               for path in out.rglob("*") if path.is_file())


def test_values_beyond_float16_stay_as_they_are(tmp_path):
    tokenizer = tiny.vqgan()
    name, counts = next((name, buffer) for name, buffer in tokenizer.named_buffers() if "cluster_size" in name)
    counts.fill_(70_000.0)
    tokenizer.save_pretrained(tmp_path / "source")
    out = export_checkpoint("float16", tmp_path / "source", tmp_path / "half")
    stored = read_tensors(out)
    assert stored[name].dtype == torch.float32
    assert stored[name].max() == 70_000
    assert stored["encoder.conv_in.weight"].dtype == torch.float16
    assert load_tokenizer(out).config == tokenizer.config


def test_wrong_uses_are_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither model_index.json nor config.json"):
        export_checkpoint("float16", tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    source = tiny.model_folder(tmp_path / "source")
    assert tokenloom.main(["export", "float16", str(source), str(source)]) == 2
    assert "exists already" in capsys.readouterr().err
