"""Published VQGANs come in and go out with equal numbers: against plain functions, diffusers' VQModel, transformers' Janus."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from inference.checkpoints import CHECKPOINT_KINDS, from_checkpoint
from inference.checkpoints.formats.vqgan_names import diffusers_name, janus_name, llamagen_name
from tests.vqgan_references import Functions, Shape, make_state
from tokenizer_image import VQGAN, load_tokenizer, preset
from tokenloom_common.errors import UserError
from tokenloom_common.pretrained import read_tensors

SIDE = 16
TOLERANCE = 1e-4
LLAMAGEN = Shape(names="llamagen")
GUMBEL = Shape(multipliers=(1, 1, 2), attention=(2,), dim=32, quantizer="gumbel")


def pictures(count: int = 3, side: int = SIDE) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def spread(state: dict[str, Tensor], book: str, functions: Functions | None = None) -> None:
    """Codes as long as latents are, so that many of them are used."""
    if functions is not None:
        state[book] *= functions.latents(pictures()).std() / state[book].std()


def assert_equal_numbers(ours: VQGAN, codes: Tensor, decoded: Tensor) -> None:
    """Codes exactly, pixels to 1e-4, on codes that say something."""
    assert codes.unique().numel() > 8
    assert torch.equal(ours.encode(pictures()), codes)
    difference = float((ours.decode(codes) - decoded.clamp(-1, 1)).abs().max())
    print(f"equality: codes {codes.numel()} of {codes.numel()}, pixels within {difference:.1e}")  # shown by pytest -rP
    assert difference < TOLERANCE
    assert decoded.clamp(-1, 1).std() > 0.05


def taming_yaml(path: Path, shape: Shape, **changes: object) -> Path:
    config = {"double_z": False, "z_channels": shape.z_channels, "resolution": SIDE, "in_channels": 3, "out_ch": 3,
              "ch": shape.channels, "ch_mult": list(shape.multipliers), "num_res_blocks": shape.blocks,
              "attn_resolutions": [SIDE >> level for level in shape.attention], "dropout": 0.0, **changes}
    path.write_text(yaml.safe_dump({"model": {"target": "taming.models.vqgan.VQModel", "params": {
        "embed_dim": shape.dim, "n_embed": shape.codes, "ddconfig": config}}}))
    return path


def lightning(state: dict[str, Tensor]) -> dict:
    """As a trainer saves it, with a loss's weights beside."""
    return {"epoch": 3, "global_step": 7, "callbacks": {}, "state_dict": {**state, "loss.logvar": torch.zeros(())}}


# ---- taming

@pytest.mark.parametrize("shape", [
    Shape(), Shape(attention=(), multipliers=(1, 2), z_channels=3, dim=3), Shape(attention=(1, 2), blocks=2), GUMBEL],
    ids=["f4", "no attention", "two levels with attention", "gumbel"])
def test_taming_gives_the_codes_and_pixels_of_plain_functions(tmp_path, shape):
    state = make_state(shape)
    functions = Functions(shape, state)
    if shape.quantizer == "vq":
        spread(state, "quantize.embedding.weight", functions)
        functions = Functions(shape, state)
    torch.save(lightning(state), tmp_path / "last.ckpt")
    settings = taming_yaml(tmp_path / "model.yaml", shape)
    ours = from_checkpoint("taming", tmp_path / "last.ckpt", settings)
    codes = functions.encode(pictures())
    assert_equal_numbers(ours, codes, functions.decode(codes))
    assert ours.config.resolution == SIDE
    assert ours.config.quantizer.kind == shape.quantizer


def test_the_yaml_beside_a_checkpoint_is_found_and_the_kind_is_told(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "checkpoints").mkdir()
    torch.save(lightning(make_state(Shape())), tmp_path / "checkpoints" / "last.ckpt")
    taming_yaml(tmp_path / "configs" / "2021-04-03-project.yaml", Shape())
    for source in (tmp_path, tmp_path / "checkpoints" / "last.ckpt"):
        assert from_checkpoint(None, source).config.resolution == SIDE


def test_a_first_stage_within_a_larger_checkpoint_is_found(tmp_path):
    state = make_state(Shape())
    torch.save({"state_dict": {**{f"first_stage_model.{name}": tensor for name, tensor in state.items()},
                               "transformer.head.weight": torch.zeros(3, 3)}}, tmp_path / "net2net.ckpt")
    ours = from_checkpoint("taming", tmp_path / "net2net.ckpt", resolution=SIDE)
    assert torch.equal(ours.state_dict()["encoder.conv_in.weight"], state["encoder.conv_in.weight"])


def test_a_moving_average_codebook_keeps_its_averages(tmp_path):
    state = make_state(Shape())
    state["quantize.embedding.cluster_size"] = torch.rand(64)
    state["quantize.embedding.embed_avg"] = torch.randn(64, 8)
    torch.save({"state_dict": state}, tmp_path / "ema.ckpt")
    ours = from_checkpoint("taming", tmp_path / "ema.ckpt", resolution=SIDE)
    assert not ours.config.quantizer.learn_codebook_by_gradient
    assert torch.equal(ours.state_dict()["quantizer.vq._codebook.embed_avg"][0], state["quantize.embedding.embed_avg"])


@pytest.mark.parametrize(("changes", "words"), [
    ({"ch": 64}, "channels 64, but the weights have 32"), ({"ch_mult": [1, 2, 2]}, "channel_multipliers"),
    ({"attn_resolutions": [16]}, "attention_resolutions"), ({"double_z": True}, "double_z true is an autoencoder without"),
    ({"resolution": "big"}, "expected pixels of a side")])
def test_a_yaml_of_another_model_is_refused_naming_the_field(tmp_path, changes, words):
    torch.save({"state_dict": make_state(Shape())}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=words):
        from_checkpoint("taming", tmp_path / "last.ckpt", taming_yaml(tmp_path / "other.yaml", Shape(), **changes))


def test_a_yaml_may_name_attention_that_no_level_has(tmp_path):
    """taming passes over it."""
    shape = Shape()
    torch.save(lightning(make_state(shape)), tmp_path / "last.ckpt")
    path = taming_yaml(tmp_path / "last.yaml", shape)
    text = path.read_text()
    path.write_text(text.replace("      - 4\n", "      - 4\n      - 5\n      - none\n"))
    assert from_checkpoint("taming", tmp_path / "last.ckpt").config.attention_resolutions == (4,)
    path.write_text(text.replace("double_z: false", "double_z: false\n      tanh_out: true"))
    with pytest.raises(UserError, match="tanh_out true"):
        from_checkpoint("taming", tmp_path / "last.ckpt")


def test_renumbered_codes_are_refused(tmp_path):
    torch.save({"state_dict": {**make_state(Shape()), "quantize.used": torch.arange(5)}}, tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"quantize\.used"):
        from_checkpoint("taming", tmp_path / "last.ckpt")


# ---- LlamaGen

@pytest.mark.parametrize("container", ["model", "ema", "state_dict"])
def test_llamagen_gives_the_codes_and_pixels_of_plain_functions(tmp_path, container):
    state = make_state(LLAMAGEN)
    functions = Functions(LLAMAGEN, state)
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()} if container == "model" else state
    torch.save({container: {**wrapped, **({} if container == "model" else {"quantize.codebook_used": torch.zeros(9)})},
                "args": argparse.Namespace(vq_model="VQ-16"), "steps": 3}, tmp_path / "vq.pt")
    for kind in ("llamagen-vq", None):
        ours = from_checkpoint(kind, tmp_path / "vq.pt", resolution=SIDE)
        codes = functions.encode(pictures())
        assert_equal_numbers(ours, codes, functions.decode(codes))


def test_ema_weights_go_before_the_last_ones(tmp_path):
    torch.save({"model": make_state(LLAMAGEN, 1), "ema": make_state(LLAMAGEN, 2)}, tmp_path / "vq.pt")
    ours = from_checkpoint("llamagen-vq", tmp_path / "vq.pt", resolution=SIDE)
    assert torch.equal(ours.state_dict()["quant_conv.bias"], make_state(LLAMAGEN, 2)["quant_conv.bias"])


# ---- diffusers

def vq_model(seed: int = 0, **changes):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    config = {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
              "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), "layers_per_block": 1, "latent_channels": 8,
              "num_vq_embeddings": 64, "vq_embed_dim": 4, "lookup_from_codebook": True, **changes}
    model = diffusers.VQModel(**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.quantize.embedding.weight.normal_(std=float(model.encode(pictures()).latents.std()))
    return model


AMUSED = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
          "mid_block_add_attention": False, "block_out_channels": (32, 96)}


@torch.no_grad()
def codes_and_pictures(model) -> tuple[Tensor, Tensor]:
    """Through VQModel's own public methods."""
    side = SIDE // 2
    codes = model.quantize(model.encode(pictures()).latents)[2][2].view(-1, side, side)
    shape = (len(codes), side, side, model.config.vq_embed_dim)
    return codes, model.decode(codes, force_not_quantize=True, shape=shape).sample


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, AMUSED, {"vq_embed_dim": None}], ids=["attention", "amused", "wide codes"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_diffusers_codes_and_pixels(tmp_path, changes, safe):
    model = vq_model(**changes)
    model.register_to_config(vq_embed_dim=model.quantize.vq_embed_dim)
    model.save_pretrained(tmp_path / "vqvae", safe_serialization=safe)
    for source, kind in ((tmp_path / "vqvae", "diffusers-vq"), (tmp_path, None)):  # a pipeline keeps it in vqvae/
        assert_equal_numbers(from_checkpoint(kind, source, resolution=SIDE), *codes_and_pictures(model))


def test_diffusers_names_of_before_017(tmp_path):
    model = vq_model()
    model.save_pretrained(tmp_path / "old", safe_serialization=False)
    path = tmp_path / "old" / "diffusion_pytorch_model.bin"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = torch.load(path, weights_only=True)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in state.items()}
    torch.save(state, path)
    assert_equal_numbers(from_checkpoint("diffusers-vq", tmp_path / "old", resolution=SIDE), *codes_and_pictures(model))


@pytest.mark.parametrize(("field", "value", "words"), [
    ("norm_type", "spatial", "norm_type 'spatial' is not what a VQGAN here has"), ("act_fn", "relu", "act_fn 'relu'"),
    ("latent_channels", 4, "latent_channels 4, but the weights have 8"), ("block_out_channels", [32], "down_block_types"),
    ("_class_name", "AutoencoderKL", "expected 'VQModel'"), ("block_out_channels", [], "expected a width for each level")])
def test_a_config_of_another_model_is_refused_naming_the_field(tmp_path, field, value, words):
    vq_model().save_pretrained(tmp_path / "vq")
    path = tmp_path / "vq" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(UserError, match=words):
        from_checkpoint("diffusers-vq", tmp_path / "vq")


# ---- Janus

def janus(seed: int = 0):
    modeling = pytest.importorskip("transformers.models.janus.modeling_janus")
    configuration = pytest.importorskip("transformers.models.janus.configuration_janus")
    torch.manual_seed(seed)
    model = modeling.JanusVQVAE(configuration.JanusVQVAEConfig(
        embed_dim=8, num_embeddings=64, latent_channels=32, base_channels=32, channel_multiplier=[1, 1, 2], num_res_blocks=1,
        num_patches=SIDE // 4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.mul_(2.0)
            parameter.add_(torch.randn_like(parameter) * 0.02)
        model.quant_conv.weight.mul_(4)
        latents = model.quant_conv(model.encoder(pictures()))
        model.quantize.embedding.weight.normal_(std=float(latents.std()))
    return model


@torch.no_grad()
def test_janus_gives_transformers_codes_and_pixels(tmp_path):
    model = janus()
    model.save_pretrained(tmp_path / "vq")
    ours = from_checkpoint("janus-vq", tmp_path / "vq", like_transformers=True)
    codes = model.encode(pictures()).image_tokens.view(3, 4, 4)
    decoded = model.decode(codes.flatten(1))
    assert_equal_numbers(ours, codes, decoded)
    trained = from_checkpoint(None, tmp_path / "vq")  # the way it was trained scales latents and codes to length 1
    unit = {"rows": trained.latents(pictures()).permute(0, 2, 3, 1), "book": model.quantize.embedding.weight}
    unit = {name: part / part.norm(dim=-1, keepdim=True) for name, part in unit.items()}
    assert torch.equal(trained.encode(pictures()), (unit["rows"] @ unit["book"].T).argmax(-1))
    assert not torch.equal(trained.encode(pictures()), codes)
    assert torch.equal(trained.decode(codes), ours.decode(codes))


def test_janus_within_the_whole_model_in_shards(tmp_path):
    from safetensors.torch import save_file

    state = {f"model.vqmodel.{name}": tensor.clone() for name, tensor in janus().state_dict().items()}
    names = sorted(state)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        other = {f"model.language_model.{file[6:11]}": torch.zeros(2)}
        save_file({key: state[key] for key in held} | other, tmp_path / file)
    places = {name: file for file, held in files.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "janus", "vq_config": {"num_patches": 4}}))
    assert from_checkpoint(None, tmp_path).config.resolution == SIDE


def test_janus_as_deepseek_names_it(tmp_path):
    state = make_state(LLAMAGEN)
    torch.save({f"gen_vision_model.{name}": tensor for name, tensor in state.items()}, tmp_path / "pytorch_model.bin")
    ours = from_checkpoint(None, tmp_path, resolution=SIDE)
    functions = Functions(LLAMAGEN, state)
    assert_equal_numbers(ours, functions.encode(pictures()), functions.decode(functions.encode(pictures())))


# ---- published sizes

TOTALS = {"vqgan-f16-1024": (343, 72_141_699), "vqgan-f16-16384": (343, 76_073_859), "vq-16": (343, 71_883_403),
          "vq-8": (299, 70_109_835)}


@pytest.mark.parametrize(("name", "naming", "tensors", "total"), [
    (name, naming, *TOTALS[name]) for name, naming in (
        ("vqgan-f16-1024", "taming"), ("vqgan-f16-16384", "taming"), ("vq-16", "llamagen"), ("vq-8", "llamagen"))])
def test_tensor_lists_and_totals_of_published_sizes(name, naming, tensors, total):
    config = preset(name)
    shape = Shape(channels=128, multipliers=config.channel_multipliers, blocks=2, z_channels=256,
                  attention=(len(config.channel_multipliers) - 1,), dim=config.embed_dim, codes=config.codebook_size,
                  names=naming)
    with torch.device("meta"):
        model = VQGAN(config)
    rename = llamagen_name if naming == "llamagen" else lambda name, levels: name
    ours = {rename(key, shape.levels): tuple(tensor.shape) for key, tensor in model.state_dict().items()
            if not key.startswith("quantizer.")}
    ours["quantize.embedding.weight"] = (config.codebook_size, config.embed_dim)
    assert ours == {key: tuple(tensor.shape) for key, tensor in shapes_only(shape).items()}
    assert len(ours) == tensors
    assert sum(torch.Size(size).numel() for size in ours.values()) == total


def shapes_only(shape: Shape) -> dict[str, Tensor]:
    """make_state without its numbers."""
    with torch.device("meta"):
        original = torch.randn
        try:
            torch.randn = lambda *size, generator=None: original(*size)
            return make_state(shape)
        finally:
            torch.randn = original


def test_names_of_the_three_orders():
    assert janus_name("decoder.up.4.attn.1.q.weight", 5) == "decoder.up.0.attn.1.q.weight"
    assert llamagen_name("decoder.up.1.upsample.conv.bias", 5) == "decoder.conv_blocks.3.upsample.conv.bias"
    assert diffusers_name("decoder.mid.attn_1.proj_out.bias", 5) == "decoder.mid_block.attentions.0.to_out.0.bias"


def test_every_kind_has_a_converter():
    import importlib

    for kind in CHECKPOINT_KINDS:
        assert callable(importlib.import_module(f"inference.checkpoints.formats.{kind.replace('-', '_')}").convert)


# ---- folders

def test_a_written_folder_loads_with_the_same_numbers_and_keeps_the_type(tmp_path):
    from inference.checkpoints import ConvertOptions, convert
    from inference.checkpoints.writing import write_converted

    half = {name: tensor.half() for name, tensor in make_state(LLAMAGEN).items()}
    torch.save({"model": half}, tmp_path / "vq.pt")
    part = convert("llamagen-vq", tmp_path / "vq.pt", ConvertOptions(resolution=SIDE))
    what, count = write_converted(part, tmp_path / "vq.pt", tmp_path / "out", "mit")
    loaded = load_tokenizer(tmp_path / "out")
    assert (what, count) == ("image tokenizer", sum(p.numel() for p in loaded.parameters()))
    assert torch.equal(loaded.encode(pictures()), part.load().encode(pictures()))
    assert read_tensors(tmp_path / "out")["encoder.conv_in.weight"].dtype == torch.float16
    assert loaded.encoder.conv_in.weight.dtype == torch.float32
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
