"""tokenizer_image/vqgan.py: saving, loading, and configs and folders that are refused."""

import json

import pytest
import torch

from tests.small_vqgan import DEBUG, make_image, make_vqgan, trained_vqgan
from tokenizer_image import VQGANConfig
from tokenizer_image.vqgan import VQGAN
from tokenloom_common.errors import MissingFileError, UserError


def test_saved_and_loaded_model_gives_equal_codes_and_pictures(tmp_path):
    model = trained_vqgan().eval()
    model.save_pretrained(tmp_path / "vqgan")
    loaded = VQGAN.from_pretrained(tmp_path / "vqgan")
    image = make_image()
    codes = model.encode(image)
    assert torch.equal(loaded.encode(image), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.quantizer.vq._codebook.initted  # or the next training step would run k-means again
    torch.manual_seed(5)
    continued = model.train()(image)
    torch.manual_seed(5)
    again = loaded.train()(image)
    assert torch.equal(continued.reconstruction, again.reconstruction)
    assert torch.equal(model.quantizer.codebook, loaded.quantizer.codebook)


def save_debug(folder):
    make_vqgan().save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    values = save_debug(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps({**values, "num_res_blocks": 2}))
    with pytest.raises(UserError, match=r"m: the weights do not fit config.json: .*missing \(decoder.up.0.block.2"):
        VQGAN.from_pretrained(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps({**values, "codebook_size": 32}))
    with pytest.raises(UserError, match=r"mis-shaped \(quantizer.vq._codebook.cluster_size \[1, 64\] instead of"):
        VQGAN.from_pretrained(tmp_path / "m")


def test_config_that_lies_about_its_size_allocates_nothing(tmp_path):
    values = save_debug(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps({**values, "codebook_size": 10**12}))
    with pytest.raises(UserError, match="mis-shaped"):
        VQGAN.from_pretrained(tmp_path / "m")


def test_unknown_config_key_gets_the_nearest_name(tmp_path):
    values = save_debug(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps({**values, "codebok_size": 64}))
    with pytest.raises(UserError, match="unknown key 'codebok_size'; did you mean 'codebook_size'"):
        VQGAN.from_pretrained(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps({**values, "kind": "vit-vqgan"}))
    with pytest.raises(UserError, match="holds kind 'vit-vqgan', expected 'vqgan'"):
        VQGAN.from_pretrained(tmp_path / "m")


def test_half_a_model_folder_is_refused(tmp_path):
    folder = tmp_path / "m"
    save_debug(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        VQGAN.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(MissingFileError, match="weights are missing"):
        VQGAN.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"config\.json is missing"):
        VQGAN.from_pretrained(folder)
    with pytest.raises(MissingFileError, match="no such model folder"):
        VQGAN.from_pretrained(tmp_path / "gone")


def test_failed_save_leaves_the_old_folder_whole(tmp_path, monkeypatch):
    model = trained_vqgan().eval()
    model.save_pretrained(tmp_path / "m")
    monkeypatch.setattr("tokenloom_common.tensor_writer.write_tensors", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        make_vqgan().save_pretrained(tmp_path / "m")
    image = make_image()
    assert torch.equal(VQGAN.from_pretrained(tmp_path / "m").encode(image), model.encode(image))
    assert [item.name for item in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(("change", "message"), [
    ({"resolution": 18, "channel_multipliers": [1, 2, 2]}, "resolution 18 is not divisible by 4 .* use 16"),
    ({"channels": 12}, "channels 12 x multiplier 1 is not divisible by norm_groups 8"),
    ({"attention_resolutions": [32]}, "attention_resolutions 32 is no level's resolution; the levels have 16, 8"),
    ({"codebook_size": 1}, "codebook_size: .*got 1"),
    ({"dropout": 1.0}, "dropout: .*got 1.0"),
    ({"embed_dim": 1}, "embed_dim 1 leaves two directions"),
    ({"norm_eps": 0}, "norm_eps: .*greater than 0, got 0"),
    ({"norm_eps": 1e5}, "norm_eps: .*got 100000.0"),
    ({"input_range": "zero_one"}, "input_range: .*'signed' or 'unit'.*got 'zero_one'"),
    ({"output_range": 1}, "output_range: .*'signed' or 'unit'.*got 1"),
    ({"has_encoder": "perhaps"}, "has_encoder: .*got 'perhaps'"),
    ({"has_encoder": False, "input_range": "unit"}, "input_range 'unit' is for an encoder, and has_encoder is false; leave it"),
    ({"channel_multipliers": []}, "channel_multipliers"),
    ({"decoder_channels": 12}, "decoder_channels 12 x multiplier 1 is not divisible by norm_groups 8"),
    ({"quantizer": {"kind": "lfq"}}, "embed_dim 8 gives codebook_size 256, got 64"),
    ({"quantizer": {"ema_decai": 0.9}}, r"unknown key 'quantizer.ema_decai'; did you mean 'quantizer.ema_decay'"),
    ({"resolutoin": 16}, "did you mean 'resolution'")])
def test_impossible_configs_are_refused_with_value_and_remedy(change, message):
    with pytest.raises(UserError, match=message):
        VQGANConfig.parse({**DEBUG.plain(), **change}, "config.json")


def test_options_left_out_of_a_config_leave_codes_and_fingerprint_settings_as_they_are(tmp_path):
    model = trained_vqgan().eval()
    folder = model.save_pretrained(tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    for name in ("norm_eps", "input_range", "output_range", "has_encoder"):
        del values[name]
    for name in ("raw_search", "kl_weight", "temperature_start", "temperature_end", "temperature_steps", "straight_through"):
        del values["quantizer"][name]
    (folder / "config.json").write_text(json.dumps(values))
    short = VQGAN.from_pretrained(folder)
    codes = model.encode(make_image())
    assert torch.equal(short.encode(make_image()), codes)
    assert torch.equal(short.decode(codes), model.decode(codes))
    # the fingerprints of models on disk are made of these: one key more would change them
    assert short.code_settings() == {
        "kind": "vqgan", "resolution": 16, "attention_resolutions": (), "norm_groups": 8,
        "quantizer": {"kind": "vq", "l2_normalize": True, "depth": 1, "levels": (), "spherical": False}}
    assert list(short.code_tensors()) == ["codebook"]
