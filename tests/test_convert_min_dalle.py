"""DALL-E mini from min-dalle's files: the same memory, logits, tokens and pixels as its own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers.min_dalle import _package
from inference import SamplingParams, TextToImage
from inference.checkpoints import from_checkpoint
from inference.checkpoints.convert import convert
from inference.checkpoints.formats.min_dalle import detokenizer_part
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import multiplier
from tests.min_dalle_peer import (
    TEXT_ROWS,
    assert_equal,
    detokenizer,
    published_states,
    run_peer,
    shaken_norms,
)
from tests.test_bpe_tokenizer import bpe_files
from tokenizer_image import VQGAN
from tokenloom_common.errors import UserError

CAPTION = "A red heart, 🐙 and an octopus"


@pytest.fixture(scope="module")
def states():
    return published_states()


def detokenizer_state(model: VQGAN) -> dict[str, Tensor]:
    return {"embedding.weight": torch.randn(2**14, 4),
            **{name: tensor for name, tensor in model.state_dict().items() if not name.startswith("quantizer.")}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, states):
    """Files side by side, and the number of heads."""
    place = bpe_files(tmp_path_factory.mktemp("min-dalle"))
    for side, state in states.items():
        torch.save(state, place / f"{side}.pt")
    torch.save(detokenizer_state(detokenizer()), place / "detoker.pt")
    (place / "heads.json").write_text('{"attention_head_count": 2}')
    return place


@pytest.fixture(scope="module")
def model(folder) -> TextToImage:
    found: Any = from_checkpoint("min-dalle", folder, folder / "heads.json")
    return found


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("caption", "steps"), [(CAPTION, 256), ("an octopus and a heart " * 12, 32)], ids=["short", "cut"])
def test_min_dalles_loop_gives_our_logits_and_tokens(folder, model, states, caption, steps):
    assert_equal(model, run_peer(folder, states, caption, steps=steps), caption)
    assert model.default_params == SamplingParams(guidance_scale=16.0, top_k=256, temperature=1.0)


def test_the_config_says_what_the_files_are(folder, model):
    config = model.seq2seq.config
    assert (config.text_vocab_size, config.text_length, config.codebook_size, config.grid) == (TEXT_ROWS, 64, 2**14, (16, 16))
    assert (config.width, config.heads, config.encoder_layers, config.decoder_layers) == (32, 2, 2, 2)
    assert torch.equal(model.seq2seq.begin_of_image, model.seq2seq.image_embedding.weight[-1])
    converted: Any = convert("min-dalle", folder, ConvertOptions(folder / "heads.json"))
    assert [note[:18] for note in converted.notes] == ["16 scales of norms", "pictures come from"]


def test_the_written_folder_is_the_same_model_in_half_the_bytes(tmp_path, folder, model, states):
    converted: Any = convert("min-dalle", folder, ConvertOptions(folder / "heads.json"))
    converted.write(tmp_path / "model", "# card\n")
    loaded = TextToImage.from_pretrained(tmp_path / "model")
    for name, tensor in model.seq2seq.state_dict().items():
        assert torch.equal(loaded.seq2seq.state_dict()[name], tensor), name
    size = sum(path.stat().st_size for path in (tmp_path / "model" / "seq2seq").glob("*.safetensors"))
    assert size < 2.1 * sum(tensor.numel() for state in states.values() for tensor in state.values())
    assert loaded.text_tokenizer.words("a red heart") == model.text_tokenizer.words("a red heart")
    tokens = torch.arange(256)[None]
    assert list(loaded.decode_tokens(tokens)[0].tobytes()) == list(model.decode_tokens(tokens)[0].tobytes())


MINI = {"encoder.pt": "encoder_mini.pt", "decoder.pt": "decoder_mini.pt", "vocab.json": "vocab_mini.json",
        "merges.txt": "merges_mini.txt", "detoker.pt": "detoker.pt"}
PACKAGE = {**{name: f"dalle_bart_mini/{name}" for name in ("encoder.pt", "decoder.pt", "vocab.json", "merges.txt")},
           "detoker.pt": "vqgan/detoker.pt"}


def arrange(source: Path, target: Path, names: dict[str, str]) -> Path:
    for ours, theirs in names.items():
        (target / theirs).parent.mkdir(parents=True, exist_ok=True)
        (target / theirs).symlink_to(source / ours)
    return target


@pytest.mark.parametrize(("give", "names"), [
    ("", PACKAGE), ("dalle_bart_mini", PACKAGE), ("", MINI), ("encoder_mini.pt", {**MINI, "heads.json": "encoder.pt"})])
def test_files_are_found_where_the_package_and_the_hub_keep_them(tmp_path, folder, give, names):
    place = arrange(folder, tmp_path / "m", names)
    converted: Any = convert("min-dalle", place / give, ConvertOptions(folder / "heads.json"))
    assert converted.text_tokenizer.vocab_size == TEXT_ROWS


def test_wrong_files_are_refused_in_one_line(tmp_path, folder):
    whole = {name: name for name in ("encoder.pt", "decoder.pt", "vocab.json", "merges.txt", "detoker.pt")}
    cases: list[tuple[dict[str, str], dict[str, Any], str]] = [
        ({"decoder.pt": ""}, {}, "decoder.pt: missing"),
        ({"detoker.pt": ""}, {}, "detoker.pt: missing"),
        ({"encoder.pt": "encoder_mini.pt"}, {"encoder.pt": {}}, "holds both sizes"),
        ({}, {"encoder.pt": {"x": torch.ones(2)}}, "no tensor is called embed_tokens.weight"),
        ({}, {"decoder.pt": {"embed_tokens.weight": torch.ones(2)}}, "expected a matrix"),
        ({}, {"detoker.pt": {"x": torch.ones(2)}}, "no tensor is called decoder.conv_in.weight")]
    for number, (moved, changed, words) in enumerate(cases):
        place = arrange(folder, tmp_path / str(number), {ours: theirs for ours, theirs in {**whole, **moved}.items()
                                                         if theirs and ours not in changed})
        for name, state in changed.items():
            torch.save(state, place / name)
        if "encoder.pt" in moved:
            (place / "encoder_mini.pt").write_bytes(b"")
        with pytest.raises(UserError, match=words) as caught:
            convert("min-dalle", place, ConvertOptions(folder / "heads.json"))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--config FILE"):
        convert("min-dalle", folder, ConvertOptions())
    with pytest.raises(UserError, match="--resolution is not read"):
        convert("min-dalle", folder, ConvertOptions(resolution=16))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="names no attention_head_count"):
        convert("min-dalle", folder, ConvertOptions(tmp_path / "x.json"))


def test_an_average_is_taken_of_all_files_or_of_none(tmp_path, folder, states):
    place = arrange(folder, tmp_path / "m", {name: name for name in ("vocab.json", "merges.txt", "detoker.pt")})
    for side, state in states.items():
        average = {name: tensor * 2 for name, tensor in state.items()}
        torch.save({"model": state, "ema": average}, place / f"{side}.pt")
    found: Any = convert("min-dalle", place, ConvertOptions(folder / "heads.json"))
    for side in ("encoder", "decoder"):
        expected = states[side]["embed_tokens.weight"] * 2
        assert torch.equal(found.seq2seq.weights[f"{side}.embed_tokens.weight"], expected)
    assert [note.split(":")[0] for note in found.notes[:2]] == ["encoder.pt", "decoder.pt"]
    torch.save(states["decoder"], place / "decoder.pt")
    with pytest.raises(UserError, match=r"one of encoder\.pt and decoder\.pt holds an average and the other does not"):
        convert("min-dalle", place, ConvertOptions(folder / "heads.json"))


@pytest.mark.parametrize(("side", "name", "change", "words"), [
    ("encoder", "layers.1.glu.fc2.weight", None, "1 missing"),
    ("encoder", "layers.1.self_attn.k_proj.bias", torch.ones(32), "1 unexpected"),
    ("decoder", "layers.0.glu.fc1.weight", torch.ones(42, 32).half(), "mis-shaped"),
    ("decoder", "layers.0.glu.fc1.weight", torch.ones(43, 32), "of different types"),
    ("decoder", "layers.7.glu.fc1.weight", torch.ones(43, 32), "no layers numbered from 0")])
def test_other_tensors_are_named(tmp_path, folder, states, side, name, change, words):
    place = arrange(folder, tmp_path / "m", {name: name for name in (
        "encoder.pt", "decoder.pt", "vocab.json", "merges.txt", "detoker.pt") if not name.startswith(side)})
    state = {key: tensor for key, tensor in states[side].items() if key != name}
    torch.save(state if change is None else {**state, name: change}, place / f"{side}.pt")
    with pytest.raises(UserError, match=words):
        convert("min-dalle", place, ConvertOptions(folder / "heads.json"))


@pytest.mark.parametrize(("inner", "width"), [(2730, 1024), (4096, 2048), (47, 35), (43, 37), (53, 38)])
def test_a_multiplier_gives_the_inner_width_again(inner, width):
    assert int(width * multiplier(inner, width)) == inner  # as x-transformers computes it


def test_another_padding_than_min_dalles_is_refused(tmp_path, folder):
    place = arrange(folder, tmp_path / "m", {name: name for name in ("encoder.pt", "decoder.pt", "merges.txt", "detoker.pt")})
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf8"))
    (place / "vocab.json").write_text(json.dumps({**vocab, "<pad>": 2, "</s>": 1}))
    with pytest.raises(UserError, match="<pad> is 2, and min-dalle takes 1"):
        convert("min-dalle", place, ConvertOptions(folder / "heads.json"))


class SmallDetokenizer(nn.Module):
    """The package's own blocks, as its VQGanDetokenizer has them, in three levels of which only the middle's width is fixed."""

    def __init__(self) -> None:
        super().__init__()
        blocks = _package().models.vqgan_detokenizer
        self.embedding, self.post_quant_conv = nn.Embedding(64, 256), nn.Conv2d(256, 256, 1)
        self.decoder = nn.Module()
        self.decoder.conv_in, self.decoder.mid = nn.Conv2d(256, 512, 3, padding=1), blocks.MiddleLayer()
        self.decoder.up = nn.ModuleList([blocks.UpsampleBlock(6, 5, False, False), blocks.UpsampleBlock(9, 6, False, True),
                                         blocks.UpsampleBlock(9, 9, True, True)])
        self.decoder.norm_out, self.decoder.conv_out = nn.GroupNorm(32, 32), nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] -> pixels [B, 3, H, W] in [0, 255], in the order of the package's forward."""
        part, hidden = self.decoder, self.post_quant_conv(self.embedding(codes).permute(0, 3, 1, 2).contiguous())
        hidden = part.mid(part.conv_in(hidden))
        for level in reversed(part.up):
            hidden = level(hidden)
        hidden = part.norm_out(hidden)
        return part.conv_out(hidden * torch.sigmoid(hidden)).clip(0.0, 1.0) * 255


def test_min_dalles_detokenizer_gives_our_pixels():
    torch.manual_seed(0)
    theirs = shaken_norms(SmallDetokenizer())
    ours: Any = detokenizer_part(theirs.state_dict(), 4, Path("detoker.pt")).load()
    codes = torch.randint(64, (2, 4, 4))
    with torch.no_grad():
        expected, found = theirs(codes) / 255, ((ours.decode(codes) + 1) / 2).clip(0, 1)
    assert found.shape == (2, 3, 16, 16)
    assert expected.std() > 0.1
    gap = float((found - expected).abs().max())
    print(f"equality: pixels of [0, 1] within {gap:.1e}")
    assert gap < 1e-5
    with pytest.raises(UserError, match="has no encoder"):
        ours.encode(torch.zeros(1, 3, 16, 16))


@pytest.mark.slow
def test_the_whole_detokenizer_gives_our_pixels():
    package = _package()
    torch.manual_seed(0)
    theirs = shaken_norms(package.models.VQGanDetokenizer())
    ours: Any = detokenizer_part(theirs.state_dict(), 16, Path("detoker.pt")).load()
    tokens = torch.randint(2**14, (1, 256))
    with torch.no_grad():
        expected = theirs(False, tokens) / 255  # [256, 256, 3]
        found = ((ours.decode(tokens.view(1, 16, 16)) + 1) / 2).clip(0, 1)[0].permute(1, 2, 0)
    assert expected.std() > 0.1
    gap = float((found - expected).abs().max())
    print(f"equality: pixels of [0, 1] within {gap:.1e}, at full size")
    assert gap < 1e-4
