"""DALL-E mini and its VQGAN from Flax's files: the same as min-dalle's code with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from inference import SamplingParams
from inference.checkpoints import from_checkpoint
from inference.checkpoints.convert import convert
from inference.checkpoints.options import ConvertOptions
from tests.flax_files import nested, write_flax
from tests.min_dalle_peer import (
    IMAGE_ROWS,
    assert_equal,
    detokenizer,
    published_states,
    run_peer,
    shaken_norms,
)
from tests.test_bpe_tokenizer import bpe_files
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.config import AS_RELEASED
from tokenizer_image.quantizer_config import QuantizerConfig
from tokenloom_common.errors import MissingFileError, UserError

BEGIN = 16387  # a row of the image embeddings, neither min-dalle's nor the last


@pytest.fixture(scope="module")
def states():
    return published_states()


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


@pytest.mark.long
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
    assert ["TextNormalizer" in note for note in plain.notes] == [False, True]
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
        assert len(found.notes) == 1 + notes
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
    assert torch.equal(converted.load_tokenizer().decode(codes), ours.decode(codes))
    with pytest.raises(UserError, match="says 32"):
        convert("vqgan-jax", tmp_path, ConvertOptions(resolution=64))
