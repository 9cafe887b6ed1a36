"""Our VQGANs as other projects' files: round trips bit for bit, and the other side's own code loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from inference.checkpoints import ConvertOptions, convert, export_checkpoint, from_checkpoint
from inference.checkpoints.files.weights_file import read_weights
from inference.checkpoints.formats.taming import LAYOUT
from inference.checkpoints.writing import write_converted
from tests import tiny
from tests.test_convert_vqgan import (
    GUMBEL,
    LLAMAGEN,
    SIDE,
    codes_and_pictures,
    lightning,
    pictures,
    taming_yaml,
    vq_model,
)
from tests.vqgan_references import Functions, Shape, make_state
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.config import AS_RELEASED
from tokenizer_image.quantizer_config import QuantizerConfig
from tokenloom_common.errors import UserError


def bits(state: dict[str, Tensor]) -> dict[str, tuple]:
    """Everything that a bit-exact copy has alike."""
    return {name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            for name, tensor in state.items()}


def written(kind: str, source: Path, out: Path, resolution: int | None = None) -> Path:
    write_converted(convert(kind, source, ConvertOptions(resolution=resolution)), source, out)
    return out


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [Shape(), GUMBEL], ids=["vq", "gumbel"])
@pytest.mark.parametrize("ending", [".ckpt", ".safetensors"])
def test_taming_comes_back_bit_for_bit(tmp_path, shape, dtype, ending):
    state = {name: tensor.to(dtype) for name, tensor in make_state(shape).items()}
    torch.save(lightning(state), tmp_path / "last.ckpt")
    taming_yaml(tmp_path / "last.yaml", shape)
    folder = written("taming", tmp_path / "last.ckpt", tmp_path / "ours")
    out = export_checkpoint("taming", folder, tmp_path / "back" / f"vqgan{ending}")
    assert bits(read_weights(out, LAYOUT).tensors) == bits(state)
    again = from_checkpoint("taming", out)  # with the yaml that was written beside it
    assert again.config == VQGAN.from_pretrained(folder).config


def test_a_moving_average_codebook_comes_back_with_its_averages(tmp_path):
    averages = {"cluster_size": torch.rand(64), "embed_avg": torch.rand(64, 8)}
    state = make_state(Shape()) | {f"quantize.embedding.{name}": value for name, value in averages.items()}
    torch.save({"state_dict": state}, tmp_path / "ema.ckpt")
    out = export_checkpoint("taming", written("taming", tmp_path / "ema.ckpt", tmp_path / "ours", SIDE), tmp_path / "back.ckpt")
    assert bits(read_weights(out, LAYOUT).tensors) == bits(state)


def test_llamagen_comes_back_bit_for_bit(tmp_path):
    state = make_state(LLAMAGEN)
    torch.save({"model": state}, tmp_path / "vq.pt")
    folder = written("llamagen-vq", tmp_path / "vq.pt", tmp_path / "ours", SIDE)
    out = export_checkpoint("llamagen-vq", folder, tmp_path / "back.pt")
    back = torch.load(out, weights_only=True)["model"]
    assert back.pop("quantize.codebook_used").shape == (65_536,)  # which LlamaGen's strict loading asks for
    assert bits(back) == bits(state)


def test_diffusers_loads_what_we_export_and_it_is_what_came_in(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = vq_model()
    model.save_pretrained(tmp_path / "in")
    folder = written("diffusers-vq", tmp_path / "in", tmp_path / "ours", SIDE)
    out = export_checkpoint("diffusers-vq", folder, tmp_path / "back")
    name = "diffusion_pytorch_model.safetensors"
    assert bits(read_weights(out / name, LAYOUT).tensors) == bits(read_weights(tmp_path / "in" / name, LAYOUT).tensors)
    loaded, report = diffusers.VQModel.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    for ours, theirs in zip(codes_and_pictures(loaded.eval()), codes_and_pictures(model), strict=True):
        assert torch.equal(ours, theirs)


def test_the_number_of_norm_groups_comes_back_from_diffusers(tmp_path):
    """Its config says it, and any number of them is ours."""
    model = VQGAN(VQGANConfig(resolution=SIDE, channels=16, channel_multipliers=(1, 2), num_res_blocks=1, norm_groups=8,
                              attention_resolutions=(), z_channels=16, codebook_size=64,
                              quantizer=QuantizerConfig(l2_normalize=False, **AS_RELEASED))).eval()
    model.save_pretrained(tmp_path / "ours")
    out = export_checkpoint("diffusers-vq", tmp_path / "ours", tmp_path / "theirs")
    back = from_checkpoint("diffusers-vq", out, resolution=SIDE)
    assert back.config == model.config
    config = json.loads((out / "config.json").read_text())
    for wrong in (5, "x", None, 0):
        (out / "config.json").write_text(json.dumps({**config, "norm_num_groups": wrong}))
        with pytest.raises(UserError, match="norm_groups"):
            from_checkpoint("diffusers-vq", out, resolution=SIDE)
    (out / "config.json").write_text(json.dumps({**config, "block_out_channels": 16}))
    with pytest.raises(UserError, match="expected a width for each level"):
        from_checkpoint("diffusers-vq", out, resolution=SIDE)


def test_a_yaml_beside_the_exported_file_is_not_overwritten(tmp_path):
    torch.save({"state_dict": make_state(Shape())}, tmp_path / "in.ckpt")
    folder = written("taming", tmp_path / "in.ckpt", tmp_path / "ours", SIDE)
    (tmp_path / "out.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"out\.yaml: exists already"):
        export_checkpoint("taming", folder, tmp_path / "out.ckpt")
    assert (tmp_path / "out.yaml").read_text() == "mine"
    assert not (tmp_path / "out.ckpt").exists()


def test_diffusers_gets_equal_numbers_from_a_tokenizer_with_unit_codes(tmp_path):
    """It compares lengths too, which are all 1 then."""
    diffusers = pytest.importorskip("diffusers")
    torch.save({"model": make_state(LLAMAGEN)}, tmp_path / "vq.pt")
    folder = written("llamagen-vq", tmp_path / "vq.pt", tmp_path / "ours", SIDE)
    ours = VQGAN.from_pretrained(folder)
    theirs = diffusers.VQModel.from_pretrained(export_checkpoint("diffusers-vq", folder, tmp_path / "back")).eval()
    with torch.no_grad():
        codes = theirs.quantize(theirs.encode(pictures()).latents)[2][2].view(3, 4, 4)
        decoded = theirs.decode(codes, force_not_quantize=True, shape=(3, 4, 4, 8)).sample
    assert torch.equal(ours.encode(pictures()), codes)
    assert (ours.decode(codes) - decoded.clamp(-1, 1)).abs().max() < 1e-4


def test_a_tokenizer_trained_here_goes_out_and_gives_the_numbers_of_plain_functions(tmp_path):
    """In a whole model folder, with EMA codes of unit length."""
    torch.manual_seed(0)
    config = VQGANConfig(resolution=SIDE, channels=32, channel_multipliers=(1, 1, 2), num_res_blocks=1, z_channels=32,
                         attention_resolutions=(4,), codebook_size=64)
    model = VQGAN(config)
    model.train()(pictures(16))
    model.eval().save_pretrained(tmp_path / "ours")
    out = export_checkpoint("llamagen-vq", tmp_path / "ours", tmp_path / "out.pt")
    functions = Functions(LLAMAGEN, torch.load(out, weights_only=True)["model"])
    assert torch.equal(functions.encode(pictures()), model.encode(pictures()))


@pytest.mark.parametrize(("kind", "changes", "words"), [
    ("taming", {"norm_groups": 8}, "taming-transformers cannot express norm_groups 8, only 32"),
    ("taming", {}, "cannot express quantizer.l2_normalize True, only False"),
    ("taming", {"mid_attention": False}, "mid_attention False"),
    ("llamagen-vq", {"attention_resolutions": ()}, "LlamaGen cannot express attention_resolutions"),
    ("llamagen-vq", {"quantizer": {"kind": "simvq"}}, "cannot express quantizer.kind 'simvq', only 'vq'"),
    ("diffusers-vq", {"channel_multipliers": (2, 2, 4)}, "diffusers cannot express channel_multipliers"),
    ("diffusers-vq", {"decoder_channels": 64}, "decoder_channels 64"),
    ("diffusers-vq", {"decoder_res_blocks": 3}, "decoder_res_blocks 3"),
    ("diffusers-vq", {"output_range": "unit"}, "output_range 'unit', only 'signed'"),
    ("diffusers-vq", {"norm_eps": 1e-5}, "norm_eps 1e-05"), ("diffusers-vq", {"has_encoder": False}, "has_encoder False")])
def test_what_another_project_cannot_express_is_refused_by_name(tmp_path, kind, changes, words):
    config = {"resolution": SIDE, "channels": 32, "channel_multipliers": (1, 1, 2), "num_res_blocks": 1,
              "attention_resolutions": (4,), "z_channels": 32, "codebook_size": 64, **changes}
    VQGAN(VQGANConfig.parse(config, "test")).save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match=words):
        export_checkpoint(kind, tmp_path / "ours", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_wrong_uses_of_export_are_one_line(tmp_path):
    folder = tiny.model_folder(tmp_path / "tiny")
    (tmp_path / "there.pt").write_bytes(b"mine")
    for kind, source, out, words in (
            ("tamin", folder, "x.ckpt", "did you mean 'taming'"), ("taming", tmp_path / "no", "x.ckpt", "no such model folder"),
            ("llamagen-vq", folder, "there.pt", "exists already"), ("taming", folder / "seq2seq", "x.ckpt", "holds kind"),
            ("taming", folder, "x.ckpt", "cannot express norm_groups")):
        with pytest.raises(UserError, match=words):
            export_checkpoint(kind, source, tmp_path / out)
    assert (tmp_path / "there.pt").read_bytes() == b"mine"
    VQGAN(VQGANConfig(channels=32, channel_multipliers=(1, 1), resolution=SIDE, attention_resolutions=(8,), num_res_blocks=1,
                      z_channels=32)).save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match=r"give a file that ends in \.pt, \.pth"):
        export_checkpoint("llamagen-vq", tmp_path / "ours", tmp_path / "x.txt")
