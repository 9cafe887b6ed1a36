"""tokenizer_image: config.py, layers.py, quantizers.py and vqgan.py."""

import json

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

from tokenizer_image.config import PRESETS, QuantizerConfig, VQGANConfig, preset
from tokenizer_image.quantizers import Quantizer
from tokenizer_image.vqgan import VQGAN
from tokenloom_common.errors import MissingFileError, UserError

DEBUG = PRESETS["debug"]
ATTENTIVE = VQGANConfig(**{**DEBUG.plain(), "attention_resolutions": [8]})


def make_vqgan(config: VQGANConfig = DEBUG) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(config)


def make_image(batch: int = 4, side: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def trained_vqgan(config: VQGANConfig = DEBUG, steps: int = 3) -> VQGAN:
    model = make_vqgan(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        image = make_image(seed=10 + step)
        result = model(image)
        optimizer.zero_grad()
        (F.l1_loss(result.reconstruction, image) + result.commit_loss).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("name", "total", "tensors"), [
    ("vqgan-f16-1024", 72_141_699, 343), ("vqgan-f16-16384", 76_073_859, 343),
    ("vq-16", 71_883_403, 343), ("vq-8", 70_109_835, 299)])
def test_presets_have_the_published_sizes(name, total, tensors):
    with torch.device("meta"):
        model = VQGAN(preset(name))
    state = model.state_dict()
    network = {key: value.numel() for key, value in state.items() if not key.startswith("quantizer.")}
    assert sum(network.values()) + model.quantizer.codebook.numel() == total
    assert len(network) + 1 == tensors


def test_debug_preset_is_small_and_complete():
    assert sum(p.numel() for p in make_vqgan().parameters()) < 200_000
    assert DEBUG.grid == (8, 8)
    assert DEBUG.num_tokens == 64
    assert DEBUG.downsampling == 2
    with pytest.raises(UserError, match="did you mean 'vq-16'"):
        preset("vq16")


def test_state_dict_has_the_published_names():
    with torch.device("meta"):
        names = set(VQGAN(preset("vq-16")).state_dict())
    for name in ("encoder.conv_in.weight", "encoder.down.2.block.0.nin_shortcut.weight",
                 "encoder.down.4.attn.1.q.weight", "encoder.down.0.downsample.conv.weight",
                 "encoder.mid.attn_1.proj_out.bias", "encoder.norm_out.weight",
                 "quant_conv.weight", "post_quant_conv.bias", "decoder.up.4.attn.2.norm.weight",
                 "decoder.up.1.upsample.conv.weight", "decoder.up.0.block.2.conv2.bias", "decoder.conv_out.weight"):
        assert name in names
    assert not {"encoder.down.4.downsample.conv.weight", "decoder.up.0.upsample.conv.weight",
                "encoder.down.3.attn.0.q.weight"} & names


@pytest.mark.parametrize("config", [DEBUG, ATTENTIVE], ids=["debug", "attention"])
def test_every_parameter_gets_a_gradient(config):
    model = make_vqgan(config).train()
    image = make_image()
    result = model(image)
    (F.l1_loss(result.reconstruction, image) + result.commit_loss).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias adds the same to every score of a query, which softmax removes.
    assert [name for name in without if not name.endswith(".k.bias")] == []


def test_codebook_learned_by_gradient_gets_a_gradient():
    quantizer = QuantizerConfig(l2_normalize=False, learn_codebook_by_gradient=True, kmeans_init=False)
    model = make_vqgan(VQGANConfig(**{**DEBUG.plain(), "quantizer": quantizer})).train()
    model(make_image()).commit_loss.backward()
    assert model.quantizer.vq._codebook.embed.grad.abs().sum() > 0


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_quantizer_equals_brute_force_nearest(l2_normalize):
    torch.manual_seed(0)
    quantizer = Quantizer(8, 64, QuantizerConfig(l2_normalize=l2_normalize, kmeans_init=False))
    latents = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.3
    book = quantizer.codebook
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 8)
    compared = F.normalize(flat, dim=1) if l2_normalize else flat
    expected = torch.tensor([min(range(64), key=lambda k: float((z - book[k]).square().sum())) for z in compared])
    assert torch.equal(quantizer.nearest(latents).flatten(), expected)
    assert torch.equal(quantizer.eval()(latents).codes.flatten(), expected)
    assert torch.equal(quantizer.train()(latents).codes.flatten(), expected)  # the library's own search
    assert expected.unique().numel() > 8


@pytest.mark.parametrize("rotation_trick", [True, False])
def test_training_and_eval_forward_give_the_same_vectors_and_loss(rotation_trick):
    torch.manual_seed(0)
    config = QuantizerConfig(kmeans_init=False, dead_code_fraction=0, rotation_trick=rotation_trick)
    quantizer = Quantizer(8, 64, config)
    latents = torch.randn(2, 8, 4, 4).requires_grad_()
    evaluated = quantizer.eval()(latents)
    trained = quantizer.train()(latents)
    torch.testing.assert_close(trained.vectors, evaluated.vectors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained.commit_loss, evaluated.commit_loss)
    assert torch.allclose(evaluated.vectors.norm(dim=1), torch.ones(2, 4, 4), atol=1e-5)  # the decoder sees unit codes


def test_commitment_weight_scales_the_commit_loss():
    losses = []
    for weight in (0.25, 0.5):
        torch.manual_seed(0)
        config = QuantizerConfig(kmeans_init=False, commitment_weight=weight)
        losses.append(Quantizer(8, 64, config).train()(torch.ones(1, 8, 4, 4)).commit_loss)
    assert losses[1].item() == pytest.approx(2 * losses[0].item())


def test_codebook_moves_in_training_and_stays_in_use():
    model = trained_vqgan()
    before = {name: tensor.clone() for name, tensor in model.quantizer.state_dict().items()}
    image = make_image()
    model.encode(image)  # in training mode
    model.eval()
    model(image)
    codes = model.encode(image)
    assert torch.equal(codes, model.encode(image))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.quantizer.state_dict().items())
    model.train()(image)
    assert not torch.equal(model.quantizer.codebook, before["vq._codebook.embed"][0])


def test_encode_before_training_does_not_start_kmeans():
    model = make_vqgan().eval()
    model.encode(make_image())
    model(make_image())
    assert not model.quantizer.vq._codebook.initted


def test_dead_codes_are_restarted_at_latents_of_the_batch():
    torch.manual_seed(0)
    config = QuantizerConfig(kmeans_init=False, ema_decay=0.0, dead_code_fraction=0.5, l2_normalize=False)
    quantizer = Quantizer(8, 64, config).train()
    latents = torch.randn(4, 8, 4, 4) + 5
    for _ in range(20):
        quantizer(latents)
    spread = torch.cdist(quantizer.codebook, latents.permute(0, 2, 3, 1).reshape(-1, 8)).min(dim=1).values
    assert spread.max() < 3  # random codes near 0 would be 14 away
    assert quantizer.nearest(latents).unique().numel() > 24


def test_encode_of_a_batch_equals_singles():
    model = trained_vqgan(ATTENTIVE).eval()
    image = make_image()
    codes = model.encode(image)
    assert codes.shape == (4, 8, 8)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, torch.cat([model.encode(one[None]) for one in image]))
    assert codes.unique().numel() > 4
    torch.testing.assert_close(model.decode(codes), torch.cat([model.decode(one[None]) for one in codes]))


def test_decode_of_encode_equals_the_clamped_forward():
    model = trained_vqgan().eval()
    image = make_image()
    result = model(image)
    assert torch.equal(result.codes, model.encode(image))
    torch.testing.assert_close(model.decode(result.codes), result.reconstruction.clamp(-1, 1))
    with torch.no_grad():
        model.last_layer.mul_(100)
    decoded = model.decode(result.codes)
    assert decoded.min() == -1
    assert decoded.max() == 1


@pytest.mark.parametrize(("codes", "message"), [
    (torch.full((1, 8, 8), 64), "code 64 is outside the codebook: valid codes are 0 to 63"),
    (torch.full((1, 8, 8), -1), "code -1 is outside"),
    (torch.zeros(1, 8, 8), "expected integer codes, got torch.float32"),
    (torch.zeros(1, 8, 8, dtype=torch.bool), "expected integer codes"),
    (torch.zeros(1, 8, 7, dtype=torch.int64), r"expected codes \[B, 8, 8\], got \[1, 8, 7\]"),
    (torch.zeros(1, 64, dtype=torch.int64), "tokens_to_codes")])
def test_decode_refuses_bad_codes(codes, message):
    with pytest.raises(UserError, match=message):
        make_vqgan().decode(codes)


def test_decode_takes_any_integer_dtype_and_an_empty_batch():
    model = make_vqgan().eval()
    codes = torch.arange(64).view(1, 8, 8)
    assert torch.equal(model.decode(codes.to(torch.int16)), model.decode(codes))
    assert model.decode(codes[:0]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(("image", "message"), [
    (torch.zeros(1, 3, 32, 32), r"expected an image \[B, 3, 16, 16\], got \[1, 3, 32, 32\]"),
    (torch.zeros(3, 16, 16), "expected an image"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "pixels_to_float")])
def test_encode_refuses_bad_images(image, message):
    with pytest.raises(UserError, match=message):
        make_vqgan().encode(image)


def test_downsampling_pads_right_and_below_only():
    model = make_vqgan()
    sample = torch.zeros(1, 16, 4, 4)
    sample[..., 0, 0] = 1
    layer = model.encoder.down[0].downsample
    with torch.no_grad():
        expected = layer.conv.weight[..., 0, 0].sum(dim=1) + layer.conv.bias
        torch.testing.assert_close(layer(sample)[0, :, 0, 0], expected)


def test_attention_equals_the_plain_formula():
    model = make_vqgan(ATTENTIVE)
    block = model.encoder.mid.attn_1
    hidden = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(3))
    query, key, value = (conv(block.norm(hidden)).flatten(2) for conv in (block.q, block.k, block.v))
    shares = (torch.einsum("bci,bcj->bij", query, key) * 32**-0.5).softmax(dim=2)
    mixed = torch.einsum("bij,bcj->bci", shares, value).view_as(hidden)
    torch.testing.assert_close(block(hidden), hidden + block.proj_out(mixed))


def test_quantizer_stays_float32_in_bfloat16_and_under_autocast():
    model = trained_vqgan()
    book = model.quantizer.codebook.clone()
    latents = torch.randn(2, 8, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = model.quantizer.nearest(latents)
        assert model(make_image()).commit_loss.dtype == torch.float32
    assert torch.equal(codes, trained_vqgan().quantizer.nearest(latents))
    model = trained_vqgan().bfloat16()
    assert torch.equal(model.quantizer.codebook, book)
    result = model(make_image().bfloat16())
    assert result.reconstruction.dtype == torch.bfloat16
    assert result.commit_loss.dtype == torch.float32
    assert all(t.dtype == torch.float32 for t in model.quantizer.buffers() if t.is_floating_point())
    assert model.eval().decode(result.codes).dtype == torch.bfloat16


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
    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
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
    ({"channel_multipliers": []}, "channel_multipliers"),
    ({"quantizer": {"learn_codebook_by_gradient": True}}, "does not work with l2_normalize"),
    ({"quantizer": {"ema_decai": 0.9}}, r"unknown key 'quantizer.ema_decai'; did you mean 'quantizer.ema_decay'"),
    ({"resolutoin": 16}, "did you mean 'resolution'")])
def test_impossible_configs_are_refused_with_value_and_remedy(change, message):
    with pytest.raises(UserError, match=message):
        VQGANConfig.parse({**DEBUG.plain(), **change}, "config.json")


@pytest.mark.parametrize("change", [
    {"mid_attention": False}, {"dropout": 0.5}, {"attention_resolutions": [8]}, {"num_res_blocks": 2},
    {"norm_groups": 4}, {"channels": 32}, {"z_channels": 8}, {"embed_dim": 4}, {"codebook_size": 32},
    {"channel_multipliers": [1, 1]},
    *({"quantizer": {name: value}} for name, value in (
        ("l2_normalize", False), ("commitment_weight", 1.0), ("ema_decay", 0.5), ("dead_code_fraction", 0.9),
        ("kmeans_init", False), ("kmeans_iterations", 1), ("rotation_trick", False)))], ids=str)
def test_each_config_field_changes_training(change):
    def outcome(config: VQGANConfig) -> list[float]:
        model = trained_vqgan(config, steps=2)
        total = sum(p.detach().double().sum() for p in model.parameters())
        return [float(total), float(model.quantizer.codebook.sum())]

    assert outcome(VQGANConfig.parse({**DEBUG.plain(), **change}, "test")) != outcome(DEBUG)


def _train_one_rank(rank: int, world: int, store: str, config: QuantizerConfig, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(100 + rank)  # ranks differ in everything random, as in a careless launch
    quantizer = Quantizer(8, 64, config).train()
    for step in range(4):
        quantizer(torch.randn(8, 8, 4, 4, generator=torch.Generator().manual_seed(10 * step + rank)))
    torch.save(quantizer.state_dict(), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("config", [
    QuantizerConfig(dead_code_fraction=0.5),  # many codes restarted at each step
    QuantizerConfig(kmeans_init=False, dead_code_fraction=0),  # none, so that the random start stays
], ids=["kmeans", "random"])
def test_two_processes_keep_one_codebook(tmp_path, config):
    mp.spawn(_train_one_rank, args=(2, str(tmp_path / "store"), config, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["vq._codebook.initted"]
    assert first["vq._codebook.embed"][0].unique(dim=0).shape[0] > 56  # distinct codes, drawn from both ranks
