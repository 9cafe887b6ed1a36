"""DALL-E mini from min-dalle's files and from Flax's: the same memory, logits, tokens and pixels as min-dalle's own code."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from benchmarks.decode_min_dalle import _package
from inference import SamplingParams, TextToImage
from inference.checkpoints import from_checkpoint
from inference.checkpoints.kinds import ConvertOptions, convert
from inference.checkpoints.min_dalle import detokenizer_part
from tests.flax_files import nested, write_flax
from tests.test_bpe_tokenizer import bpe_files
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.config import AS_RELEASED
from tokenizer_image.quantizer_config import QuantizerConfig
from tokenloom_common.errors import MissingFileError, UserError

SIZES = {"embed_count": 32, "attention_head_count": 2, "glu_embed_count": 43, "layer_count": 2, "device": "cpu"}
TEXT_ROWS, IMAGE_ROWS, BEGIN = 400, 16391, 16387  # more image embeddings than codes, as mega has
CAPTION = "A red heart, 🐙 and an octopus"
UNSCALED = ("pre_self_attn_layer_norm", "pre_encoder_attn_layer_norm", "glu.ln0", "glu.ln1", "final_ln")
"""Norms before a matrix, of which Flax keeps no scale."""


@dataclass
class Peer:
    """min-dalle's own loop over one caption, with what its parts gave."""

    memory: Tensor
    """[2, T, D]; the caption's second."""
    logits: Tensor
    """[2, N, K]."""
    tokens: Tensor
    """[1, N] or its first so many, drawn with guidance 16, always the likeliest."""


@pytest.fixture(scope="module")
def states():
    """State dicts of the package's encoder and decoder as the published files hold them: float16, without some scales."""
    models = _package().models
    torch.manual_seed(0)
    parts = {"encoder": models.DalleBartEncoder(text_vocab_count=TEXT_ROWS, text_token_count=64, **SIZES),
             "decoder": models.DalleBartDecoder(image_vocab_count=IMAGE_ROWS, **SIZES)}
    return {side: published(module) for side, module in parts.items()}


def published(module: nn.Module) -> dict[str, Tensor]:
    for name, parameter in module.named_parameters():
        if "q_proj" in name or "embed_positions" in name:  # tokens differ from place to place
            parameter.data *= 4
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.weight.data = 1 + 0.3 * torch.randn(part.weight.shape)
            part.bias.data = 0.3 * torch.randn(part.bias.shape)
    return {name: tensor.half() for name, tensor in module.state_dict().items()
            if not any(name.endswith(f"{norm}.weight") for norm in UNSCALED)}


def detokenizer(seed: int = 0) -> VQGAN:
    """16 x 16 codes of 16,384 and a pixel each: what stands for the VQGAN where its pictures do not matter."""
    torch.manual_seed(seed)
    return VQGAN(VQGANConfig(resolution=16, channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(),
                             mid_attention=False, z_channels=8, embed_dim=4, codebook_size=2**14, norm_eps=1e-5,
                             output_range="unit", has_encoder=False,
                             quantizer=QuantizerConfig(l2_normalize=False, **AS_RELEASED))).eval()


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


def run_peer(folder: Path, states: dict[str, dict[str, Tensor]], caption: str, begin: int | None = None,
             steps: int = 256) -> Peer:
    """min-dalle's generate_raw_image_stream with the files' weights, left after `steps` tokens (a multiple of 32); begin: a row
    to begin with instead of its 16383."""
    package = _package()
    from min_dalle.text_tokenizer import TextTokenizer

    loop = package.MinDalle.__new__(package.MinDalle)  # its __init__ downloads
    loop.device, loop.dtype, loop.is_reusable, loop.text_token_count = "cpu", torch.float32, True, 64
    loop.layer_count, loop.embed_count = SIZES["layer_count"], SIZES["embed_count"]
    loop.tokenizer = TextTokenizer(json.loads((folder / "vocab.json").read_text(encoding="utf8")),
                                   (folder / "merges.txt").read_text(encoding="utf8").split("\n")[1:-1])
    loop.encoder = package.models.DalleBartEncoder(text_vocab_count=TEXT_ROWS, text_token_count=64, **SIZES)
    loop.decoder = package.models.DalleBartDecoder(image_vocab_count=IMAGE_ROWS, **SIZES)
    memories, logits = [], []
    for side, part in (("encoder", loop.encoder), ("decoder", loop.decoder)):
        part.load_state_dict(states[side], strict=False)  # as its init_encoder
        part.eval().requires_grad_(False)
    encode, decode = loop.encoder.forward, loop.decoder.forward

    def encoder_forward(text_tokens):
        memories.append(encode(text_tokens))
        return memories[-1]

    def decoder_forward(**inputs):
        if begin is not None and not logits:
            inputs["prev_tokens"] = torch.full_like(inputs["prev_tokens"], begin)
        found, state = decode(**inputs)
        logits.append(found[:, -1, : 2**14])
        return found, state

    loop.encoder.forward, loop.decoder.forward = encoder_forward, decoder_forward
    loop.image_grid_from_tokens = lambda image_tokens, **_: image_tokens
    with torch.no_grad():
        partly = loop.generate_raw_image_stream(caption, seed=1, grid_size=1, top_k=1, supercondition_factor=16,
                                                progressive_outputs=True)
        tokens = next(itertools.islice(partly, steps // 32 - 1, None))
        partly.close()
    return Peer(memories[0], torch.stack(logits, dim=1), tokens[:, :steps])


def assert_equal(model: TextToImage, peer: Peer, caption: str) -> None:
    """Memory, the logits of every step, and the tokens of a greedy guided picture."""
    source = model.text_tokenizer
    text, mask = (torch.cat(parts) for parts in zip(source.null_caption(), source.encode([caption]), strict=True))
    with torch.no_grad():
        memory = model.seq2seq.encode_text(text, mask)
        logits = model.seq2seq.decode(memory, mask, peer.tokens[:, :-1].expand(2, -1)).image
    assert (memory - peer.memory)[mask].abs().max() < 1e-5
    assert (logits - peer.logits).abs().max() < 1e-5
    assert peer.logits.std() > 0.3
    assert len(set(peer.tokens[0].tolist())) > 5
    drawn = model.sample_tokens(caption, params=SamplingParams(guidance_scale=16.0, temperature=0.0))
    assert torch.equal(drawn[:, : peer.tokens.shape[1]], peer.tokens)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_min_dalles_loop_gives_our_logits_and_tokens(folder, model, states):
    assert_equal(model, run_peer(folder, states, CAPTION), CAPTION)
    assert model.default_params == SamplingParams(guidance_scale=16.0, top_k=256, temperature=1.0)


def test_the_config_says_what_the_files_are(folder, model):
    config = model.seq2seq.config
    assert (config.text_vocab_size, config.text_length, config.codebook_size, config.grid) == (TEXT_ROWS, 64, 2**14, (16, 16))
    assert (config.width, config.heads, config.encoder_layers, config.decoder_layers) == (32, 2, 2, 2)
    assert torch.equal(model.seq2seq.begin_of_image, model.seq2seq.image_embedding.weight[-1])
    converted: Any = convert("min-dalle", folder, ConvertOptions(folder / "heads.json"))
    assert [note.split(" are not")[0] for note in converted.seq2seq.notes] == ["16 scales of norms"]


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
        ({}, {"encoder.pt": {"x": torch.ones(2)}}, "lacks encoder.embed_tokens.weight"),
        ({}, {"decoder.pt": {"embed_tokens.weight": torch.ones(2)}}, "expected a matrix"),
        ({}, {"detoker.pt": {"x": torch.ones(2)}}, "no levels")]
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


def shaken_norms(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.weight.data = 1 + 0.3 * torch.randn(part.weight.shape)
            part.bias.data = 0.3 * torch.randn(part.bias.shape)
    return module.eval().requires_grad_(False)


def test_min_dalles_detokenizer_gives_our_pixels():
    torch.manual_seed(0)
    theirs = shaken_norms(SmallDetokenizer())
    ours: Any = detokenizer_part(theirs.state_dict(), 4, Path("detoker.pt")).load()
    codes = torch.randint(64, (2, 4, 4))
    with torch.no_grad():
        expected, found = theirs(codes) / 255, ((ours.decode(codes) + 1) / 2).clip(0, 1)
    assert found.shape == (2, 3, 16, 16)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5
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
    assert (found - expected).abs().max() < 1e-4


# ---- Flax ----

FLAX_PARTS = {"pre_self_attn_layer_norm": "LayerNorm_0", "self_attn_layer_norm": "LayerNorm_1",
              "self_attn": "FlaxBartAttention_0",
              "pre_encoder_attn_layer_norm": "LayerNorm_2", "encoder_attn_layer_norm": "LayerNorm_3",
              "encoder_attn": "FlaxBartAttention_1", "glu.ln0": "GLU_0.LayerNorm_0", "glu.ln1": "GLU_0.LayerNorm_1",
              "glu.fc0": "GLU_0.Dense_0", "glu.fc1": "GLU_0.Dense_1", "glu.fc2": "GLU_0.Dense_2"}


def flax_tree(states: dict[str, dict[str, Tensor]], scanned: bool) -> dict[str, Any]:
    """min-dalle's tensors where dalle-mini's Flax modules keep theirs."""
    found: dict[str, Any] = {}
    for side, state in states.items():
        title = side.title()
        for name, tensor in state.items():
            if name == "lm_head.weight":
                found["lm_head.kernel"] = tensor.t().numpy()
            elif not name.startswith("layers."):
                leaf = "bias" if name.endswith("bias") else "embedding" if name.startswith("embed") else "scale"
                found[f"model.{side}.{name.rsplit('.', 1)[0]}.{leaf}"] = tensor.numpy()
            else:
                _, layer, rest = name.split(".", 2)
                part, kind = rest.rsplit(".", 1)
                tail = next((f"{theirs}{part[len(ours):]}" for ours, theirs in FLAX_PARTS.items()
                             if part == ours or part.startswith(f"{ours}.")))
                leaf = "bias" if kind == "bias" else "kernel" if tensor.ndim == 2 else "scale"
                place = f"FlaxBart{title}Layers" if scanned else f"FlaxBart{title}Layer_{layer}"
                value = (tensor.t() if tensor.ndim == 2 else tensor).numpy()
                key = f"model.{side}.layers.{place}.{tail}.{leaf}"
                found[key] = [*found.get(key, []), value] if scanned else value
    return nested({name: numpy.stack(value) if isinstance(value, list) else numpy.ascontiguousarray(value)
                   for name, value in found.items()})


CONFIG = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 43, "decoder_ffn_dim": 43,
          "image_vocab_size": IMAGE_ROWS, "decoder_start_token_id": BEGIN, "activation_function": "gelu",
          "ln_positions": "normformer", "normalize_text": True, "use_scan": True}


def flax_folder(place: Path, states, scanned: bool = True, **changes) -> Path:
    place.mkdir(exist_ok=True)
    bpe_files(place)
    write_flax(place / "flax_model.msgpack", flax_tree(states, scanned))
    (place / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return place


@pytest.fixture(scope="module")
def image_tokenizer(tmp_path_factory) -> Path:
    return detokenizer().save_pretrained(tmp_path_factory.mktemp("tokenizer") / "t")


@pytest.fixture(scope="module")
def flax(tmp_path_factory, states) -> Path:
    return flax_folder(tmp_path_factory.mktemp("dalle-mini"), states)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_flax_files_give_the_same_with_a_beginning_of_their_own(flax, image_tokenizer, states):
    model: Any = from_checkpoint("dalle-mini", flax, image_tokenizer=image_tokenizer)
    caption = " a red heart and an octopus"  # ASCII in lower case: both ways of splitting give the same ids
    assert_equal(model, run_peer(flax, states, caption, begin=BEGIN, steps=64), caption)
    assert model.default_params == SamplingParams(guidance_scale=10.0, top_k=0, temperature=1.0)


def test_numbered_layers_are_the_same_as_a_stack(tmp_path, flax, image_tokenizer, states):
    stacked: Any = convert("dalle-mini", flax, ConvertOptions(image_tokenizer=image_tokenizer))
    numbered: Any = convert("dalle-mini", flax_folder(tmp_path / "n", states, scanned=False),
                            ConvertOptions(image_tokenizer=image_tokenizer))
    assert stacked.seq2seq.config == numbered.seq2seq.config
    for name in stacked.seq2seq.rules:
        assert torch.equal(stacked.seq2seq.tensor(name), numbered.seq2seq.tensor(name)), name


def test_a_picture_begins_where_the_config_says(tmp_path, flax, image_tokenizer, states):
    for changes, row in (({}, BEGIN), ({"decoder_start_token_id": 16384}, 16384)):
        (flax / "other.json").write_text(json.dumps({**CONFIG, **changes}))
        converted: Any = convert("dalle-mini", flax, ConvertOptions(flax / "other.json", image_tokenizer=image_tokenizer))
        assert torch.equal(converted.seq2seq.tensor("begin_of_image"), states["decoder"]["embed_tokens.weight"][row])
    (flax / "other.json").write_text(json.dumps({name: value for name, value in CONFIG.items() if name[:7] != "decoder"
                                                 or name != "decoder_start_token_id"}))
    converted = convert("dalle-mini", flax, ConvertOptions(flax / "other.json", image_tokenizer=image_tokenizer))
    assert torch.equal(converted.seq2seq.tensor("begin_of_image"), states["decoder"]["embed_tokens.weight"][IMAGE_ROWS])


def test_the_text_tokenizer_follows_tokenizer_json(tmp_path, flax, image_tokenizer, states):
    from tokenizers import Tokenizer, models, normalizers

    vocab = json.loads((flax / "vocab.json").read_text(encoding="utf8"))
    merges = [tuple(line.split()) for line in (flax / "merges.txt").read_text(encoding="utf8").split("\n")[1:-1]]
    plain: Any = convert("dalle-mini", flax, ConvertOptions(image_tokenizer=image_tokenizer))
    assert (plain.text_tokenizer.config.lowercase, plain.text_tokenizer.config.prefix_space) == (True, True)
    assert ["TextNormalizer" in note for note in plain.notes] == [True]
    place = flax_folder(tmp_path / "j", states, normalize_text=False)
    for name in ("vocab.json", "merges.txt"):
        (place / name).unlink()
    for normalizer, lowers, notes in ((None, False, 0), (normalizers.Lowercase(), True, 0),
                                      (normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), True, 1)):
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        tokenizer.save(str(place / "tokenizer.json"))
        found: Any = convert("dalle-mini", place, ConvertOptions(image_tokenizer=image_tokenizer))
        assert (found.text_tokenizer.config.lowercase, found.text_tokenizer.config.prefix_space) == (lowers, False)
        assert len(found.notes) == notes
        assert torch.equal(found.text_tokenizer.encode(["a red heart"]).text_input,
                           like(plain, lowercase=lowers, prefix_space=False).encode(["a red heart"]).text_input)
    for written, words in (("{", "cannot be read"), ("[]", "expected a mapping"), ("{}", "not a tokenizer of byte-pair"),
                           ('{"model": {"vocab": {"a": 1}, "merges": []}}', "tokenizer.json: vocab.json lacks <s>")):
        (place / "tokenizer.json").write_text(written)
        with pytest.raises(UserError, match=words):
            convert("dalle-mini", place, ConvertOptions(image_tokenizer=image_tokenizer))
    (place / "tokenizer.json").unlink()
    with pytest.raises(MissingFileError, match="text tokenizer is missing"):
        convert("dalle-mini", place, ConvertOptions(image_tokenizer=image_tokenizer))


def like(converted, **changes):
    """Its text tokenizer with other settings."""
    source = converted.text_tokenizer
    return type(source)(source.vocab_text, source.merges_text, source.config.model_copy(update=changes))


@pytest.mark.parametrize(("changes", "words"), [
    ({"ln_positions": "swinv2"}, "ln_positions 'swinv2' is not converted"),
    ({"use_glu": False}, "use_glu False is not converted"),
    ({"decoder_ffn_dim": 44}, "differ"),
    ({"encoder_attention_heads": 3, "decoder_attention_heads": 3}, "width 32 is not that of 3"),
    ({"encoder_attention_heads": "2", "decoder_attention_heads": "2"}, "expected a number of heads"),
    ({"decoder_start_token_id": -1}, "decoder_start_token_id -1"),
    ({"decoder_start_token_id": 99999}, "too few")])
def test_other_variants_are_refused(flax, image_tokenizer, changes, words):
    (flax / "other.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(UserError, match=words):
        convert("dalle-mini", flax, ConvertOptions(flax / "other.json", image_tokenizer=image_tokenizer))


def test_what_a_folder_lacks_is_named(tmp_path, flax, image_tokenizer, states):
    with pytest.raises(UserError, match="--image-tokenizer DIR"):
        convert("dalle-mini", flax, ConvertOptions())
    with pytest.raises(MissingFileError, match=r"no flax_model\.msgpack"):
        convert("dalle-mini", tmp_path, ConvertOptions(image_tokenizer=image_tokenizer))
    place = flax_folder(tmp_path / "n", states)
    (place / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"config\.json: missing"):
        convert("dalle-mini", place, ConvertOptions(image_tokenizer=image_tokenizer))
    tree = flax_tree(states, scanned=True)
    layers = tree["model"]["decoder"]["layers"]["FlaxBartDecoderLayers"]
    layers["FlaxBartAttention_0"]["head_scale"] = numpy.ones((2, 1, 1, 2, 1))
    write_flax(place / "flax_model.msgpack", tree)
    (place / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=r"2 unexpected \(decoder.layers.0.self_attn.head_scale"):
        convert("dalle-mini", place, ConvertOptions(image_tokenizer=image_tokenizer))


# ---- VQGAN-jax ----

def jax_tree(model: VQGAN) -> dict[str, Any]:
    """A VQGAN's tensors where VQGAN-jax keeps them: [height, width, in, out], numbers behind an underscore."""
    found = {"quantize.embedding.embedding": model.codebook.numpy()}
    for name, tensor in model.state_dict().items():
        if name.startswith("quantizer."):
            continue
        place, leaf = name.rsplit(".", 1)
        for word in ("down", "up", "block", "attn"):
            for number in range(5):
                place = f"{place}.".replace(f"{word}.{number}.", f"{word}_{number}.").removesuffix(".")
        kind = "bias" if leaf == "bias" else "kernel" if tensor.ndim == 4 else "scale"
        array = tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor
        found[f"{place}.{kind}"] = numpy.ascontiguousarray(array.numpy())
    return nested(found)


def test_vqgan_jax_encodes_and_decodes_the_same(tmp_path, flax):
    torch.manual_seed(0)
    config = VQGANConfig(resolution=32, channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(16,),
                         z_channels=8, embed_dim=8, codebook_size=2**14, input_range="unit", output_range="unit",
                         quantizer=QuantizerConfig(l2_normalize=False, **AS_RELEASED))
    ours: Any = shaken_norms(VQGAN(config))
    write_flax(tmp_path / "flax_model.msgpack", jax_tree(ours))
    (tmp_path / "config.json").write_text('{"resolution": 32, "n_embed": 16384}')
    found: Any = from_checkpoint("vqgan-jax", tmp_path)
    assert found.config == config
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(found.latents(image), ours.latents(image))
    assert torch.equal(found.codebook, ours.codebook)
    codes = torch.randint(2**14, (2, 16, 16))
    assert torch.equal(found.decode(codes), ours.decode(codes))
    converted: Any = convert("dalle-mini", flax, ConvertOptions(image_tokenizer=tmp_path))
    assert torch.equal(converted.tokenizer().decode(codes), ours.decode(codes))
    with pytest.raises(UserError, match="says 32"):
        convert("vqgan-jax", tmp_path, ConvertOptions(resolution=64))
