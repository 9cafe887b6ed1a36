"""The contract that every family of image tokenizers keeps with every quantizer: tokenizer_image/image_tokenizer.py."""

import functools

import pytest
import torch

from tokenizer_image import (
    IMAGE_TOKENIZERS,
    DVAEConfig,
    ImageTokenizer,
    ImageTokenizerConfig,
    QuantizerConfig,
    TokenizerLossConfig,
    ViTVQGANConfig,
    VQGANConfig,
    build_tokenizer,
    codes_to_tokens,
    image_tokenizer,
    load_tokenizer,
    preset,
    tokenizer_loss,
    tokens_to_codes,
)
from tokenizer_image.fingerprint import code_fingerprint
from tokenizer_image.quantizers import QUANTIZERS
from tokenloom_common.errors import UserError

FSQ = {"embed_dim": 3, "quantizer": QuantizerConfig(kind="fsq", levels=(4, 4, 4))}


def vqgan(**changes) -> VQGANConfig:
    return VQGANConfig.parse({**preset("debug").plain(), "attention_resolutions": [8], **changes}, "test")


def vq(**options) -> VQGANConfig:
    return vqgan(quantizer=QuantizerConfig(**options))


CONFIGS: dict[str, ImageTokenizerConfig] = {
    "vqgan-vq-ema-l2": vq(),
    "vqgan-vq-ema-euclid": vq(l2_normalize=False),
    "vqgan-vq-gradient-l2": vq(learn_codebook_by_gradient=True),
    "vqgan-vq-gradient-euclid": vq(learn_codebook_by_gradient=True, l2_normalize=False),
    "vqgan-residual": vq(kind="residual", depth=2),
    "vqgan-fsq": vqgan(**FSQ),
    "vqgan-lfq": vqgan(embed_dim=6, quantizer=QuantizerConfig(kind="lfq")),
    "vqgan-simvq": vq(kind="simvq"),
    "vqgan-gumbel": vq(kind="gumbel", temperature_steps=100),
    "vqgan-vq-gradient-raw": vq(learn_codebook_by_gradient=True, raw_search=True, kmeans_init=False, dead_code_fraction=0.0),
    "vit-vq": preset("vit-debug"),
    "vit-residual": ViTVQGANConfig(**{**preset("vit-debug").plain(), "quantizer": QuantizerConfig(kind="residual", depth=2)}),
    "vit-fsq": ViTVQGANConfig(**{**preset("vit-debug").plain(), **FSQ}),
    "dvae-pixels": preset("dvae-debug"),
    "dvae-logit-laplace": DVAEConfig(**{**preset("dvae-debug").plain(), "output": "logit_laplace"}),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def make_image(batch: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def build(config: ImageTokenizerConfig, seed: int = 0) -> ImageTokenizer:
    torch.manual_seed(seed)
    return build_tokenizer(config)


def total_loss(model: ImageTokenizer, image: torch.Tensor, seed: int = 7) -> torch.Tensor:
    torch.manual_seed(seed)  # k-means, restarts and relaxed samples are random
    return tokenizer_loss(model(image), image, TokenizerLossConfig()).total


@functools.cache
def trained_state(name: str) -> dict[str, torch.Tensor]:
    model = build(CONFIGS[name]).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(3):
        model.set_step(step, 10)
        optimizer.zero_grad()
        total_loss(model, make_image(4, seed=10 + step), seed=step).backward()
        optimizer.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


def trained(name: str) -> ImageTokenizer:
    """The same few steps of training for every test: k-means is done, codes have moved."""
    model = build(CONFIGS[name])
    model.load_state_dict(trained_state(name))
    model.set_step(3, 10)
    return model.eval()


def copy_of_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]


def test_every_kind_and_every_quantizer_is_tested_here():
    assert {type(build(config)) for config in CONFIGS.values()} == set(IMAGE_TOKENIZERS.values())
    assert {config.quantizer.kind for config in CONFIGS.values() if hasattr(config, "quantizer")} == set(QUANTIZERS)


@every_config
def test_codes_are_integers_of_the_grid_and_fold_to_tokens_and_back(name):
    model = trained(name)
    codes = model.encode(make_image())
    assert codes.dtype == torch.int64
    assert codes.shape == (3, *model.grid) == (3, *model.config.grid)
    assert codes.min() >= 0
    assert codes.max() < model.codebook_size == model.config.codebook_size
    assert codes.unique().numel() > 3
    tokens = codes_to_tokens(codes)
    assert tokens.shape == (3, model.num_tokens)
    assert torch.equal(tokens_to_codes(tokens, model.grid), codes)
    assert model.codebook.shape[0] == model.depth * model.codebook_size
    assert model.codebook.dtype == torch.float32


@every_config
def test_a_batch_is_encoded_and_decoded_as_its_singles(name):
    model = trained(name)
    image = make_image()
    codes = model.encode(image)
    assert torch.equal(codes, model.encode(image))
    assert torch.equal(codes, torch.cat([model.encode(one[None]) for one in image]))
    assert not torch.equal(codes[0], codes[1])
    torch.testing.assert_close(model.decode(codes), torch.cat([model.decode(one[None]) for one in codes]))
    assert torch.equal(codes, model.encode(image.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("bound", [0, 10**9])
def test_the_memory_layout_changes_no_value(bound, monkeypatch):
    model = trained("vqgan-vq-ema-l2")
    image = make_image()
    codes, picture = model.encode(image), model.decode(model.encode(image))
    seen = []
    hook = model.post_quant_conv.register_forward_pre_hook(lambda _, given: seen.append(given[0].stride()[1] == 1))
    monkeypatch.setattr(image_tokenizer, "CHANNELS_LAST_PIXELS", bound)
    assert torch.equal(model.encode(image), codes)
    torch.testing.assert_close(model.decode(codes), picture)
    hook.remove()
    assert seen == [bound == 0]  # channels-last from the bound on


@every_config
def test_decode_of_encode_equals_the_clamped_forward(name):
    model = trained(name)
    image = make_image()
    result = model(image)
    picture = model.decode(model.encode(image))
    assert torch.equal(result.codes, model.encode(image))
    assert picture.shape == result.reconstruction.shape == image.shape
    torch.testing.assert_close(picture, result.reconstruction.clamp(-1, 1))
    with torch.no_grad():
        model.last_layer.mul_(100)
    picture = model.decode(result.codes)
    assert picture.min() == -1
    assert picture.max() == 1
    assert model.decode(result.codes[:0]).shape == (0, 3, 16, 16)


@every_config
@pytest.mark.parametrize("training", [True, False])
def test_loss_parts_are_finite_float32_scalars(name, training):
    model = trained(name).train(training)
    result = model(make_image())
    for part in result.losses.values():
        assert part.value.shape == ()
        assert part.value.dtype == torch.float32
        assert part.value.isfinite()
        assert type(part.weight) is float
    loss = tokenizer_loss(result, make_image(), TokenizerLossConfig())
    assert loss.total.isfinite()
    torch.testing.assert_close(torch.stack(list(loss.weighted.values())).sum(), loss.total.detach())


@every_config
def test_every_parameter_gets_a_gradient(name):
    model = trained(name).train()
    total_loss(model, make_image()).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key's bias adds the same to every score of a query, which softmax removes.
    assert [key for key in without if not key.endswith(".k.bias")] == []
    assert all(p.requires_grad for p in model.parameters())
    if "gradient" in name:
        assert any(key.startswith("quantizer.") for key, _ in model.named_parameters())


@every_config
@pytest.mark.parametrize("training", [True, False])
def test_encode_and_decode_change_nothing(name, training):
    for model in (trained(name).train(training), build(CONFIGS[name]).train(training)):
        before = copy_of_state(model)
        model.decode(model.encode(make_image()))
        assert differing(before, model.state_dict()) == []
        assert model.take_restarts() == 0
        assert model.take_rewritten() == []
        if not training:
            model(make_image())
            assert differing(before, model.state_dict()) == []


@every_config
def test_training_runs_in_bfloat16_and_keeps_what_must_be_float32(name):
    model = trained(name).bfloat16().train()
    image = make_image().bfloat16()
    result = model(image)
    assert result.reconstruction.dtype == torch.bfloat16
    assert all(part.value.dtype == torch.float32 for part in result.losses.values())
    tokenizer_loss(result, image, TokenizerLossConfig()).total.backward()
    quantizer = getattr(model, "quantizer", torch.nn.Identity())
    assert all(b.dtype == torch.float32 for b in quantizer.buffers() if b.is_floating_point())
    codes = model.eval().encode(image)
    assert model.decode(codes).dtype == torch.bfloat16
    assert model.codebook.dtype == torch.float32


@every_config
def test_autocast_keeps_losses_in_float32(name):
    model = trained(name).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = model(make_image())
        codes = model.encode(make_image())
        picture = model.decode(codes)
    assert all(part.value.dtype == torch.float32 for part in result.losses.values())
    assert picture.isfinite().all()


@every_config
def test_saved_and_loaded_model_gives_equal_codes_and_pictures(name, tmp_path):
    model = trained(name)
    loaded = load_tokenizer(model.save_pretrained(tmp_path / "model"))
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    codes = model.encode(make_image())
    assert torch.equal(loaded.encode(make_image()), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    assert code_fingerprint(loaded) == code_fingerprint(model)


@every_config
def test_frozen_codes_stay_bit_identical_while_the_decoder_learns(name):
    model = trained(name).freeze_codes().train()
    before, fingerprint, codes = copy_of_state(model), code_fingerprint(model), model.encode(make_image())
    book = model.codebook.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model.train()  # as a loop does after each evaluation
        model.set_step(5, 10)
        result = model(make_image())
        assert result.losses == {}
        optimizer.zero_grad()
        tokenizer_loss(result, make_image(), TokenizerLossConfig()).total.backward()
        for key, p in model.named_parameters():  # one that is neither frozen nor reached would stop a run on several processes
            decides = key.startswith(tuple(f"{part}." for part in model.code_parts))
            assert p.requires_grad is not decides
            assert decides or key.endswith(".k.bias") or (p.grad is not None and p.grad.abs().sum() > 0)
        assert not any(module.training for part in model.code_parts for module in model.get_submodule(part).modules())
        optimizer.step()
    assert torch.equal(model.codebook, book)
    changed = differing(before, model.state_dict())
    assert {key.split(".")[0] for key in changed} <= {key.split(".")[0] for key in before} - set(model.code_parts)
    assert any(key.startswith("decoder.") for key in changed)
    assert code_fingerprint(model) == fingerprint
    assert torch.equal(model.eval().encode(make_image()), codes)


@every_config
def test_gradient_checkpointing_keeps_less_and_computes_the_same(name):
    def run(checkpointing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        model = trained(name).train()
        model.gradient_checkpointing = checkpointing
        assert model.gradient_checkpointing is checkpointing
        numbers = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = total_loss(model, make_image())
        kept = numbers
        loss.backward()
        return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}, kept

    loss, gradients, kept = run(False)
    again, same_gradients, kept_less = run(True)
    assert torch.equal(loss, again)
    assert differing(gradients, same_gradients) == []
    assert kept_less < 0.6 * kept


@every_config
def test_fingerprints_differ_by_seed_and_by_each_part_that_decides_codes(name):
    model = build(CONFIGS[name], seed=0)
    first = code_fingerprint(model)
    assert first == code_fingerprint(build(CONFIGS[name], seed=0))
    assert first != code_fingerprint(build(CONFIGS[name], seed=1))
    with torch.no_grad():
        model.last_layer.mul_(2)
    assert first == code_fingerprint(model)
    with torch.no_grad():
        next(model.encoder.parameters()).mul_(2)
    assert first != code_fingerprint(model)


@every_config
@pytest.mark.parametrize(("image", "message"), [
    (torch.zeros(1, 3, 32, 16), r"expected an image \[B, 3, 16, 16\], got \[1, 3, 32, 16\]"),
    (torch.zeros(3, 16, 16), "expected an image"),
    (torch.zeros(1, 1, 16, 16), "expected an image"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "pixels_to_float")], ids=["side", "dimensions", "channels", "integers"])
def test_wrong_images_are_refused_in_one_line(name, image, message):
    model = build(CONFIGS[name])
    for call in (model.encode, model):
        with pytest.raises(UserError, match=message) as refused:
            call(image)
        assert "\n" not in str(refused.value)


@every_config
def test_wrong_codes_are_refused_in_one_line(name):
    model = build(CONFIGS[name])
    size, grid = model.codebook_size, model.grid
    for codes, message in ((torch.full((1, *grid), size), f"code {size} is outside .* valid codes are 0 to {size - 1}"),
                           (torch.full((1, *grid), -1), "code -1 is outside"),
                           (torch.zeros(1, *grid), "expected integer codes, got torch.float32"),
                           (torch.zeros(1, *grid, dtype=torch.bool), "expected integer codes"),
                           (torch.zeros(1, grid[0], grid[1] + 1, dtype=torch.int64), "expected codes"),
                           (torch.zeros(1, model.num_tokens, dtype=torch.int64), "tokens_to_codes")):
        with pytest.raises(UserError, match=message) as refused:
            model.decode(codes)
        assert "\n" not in str(refused.value)


@every_config
@pytest.mark.parametrize("started", [True, False], ids=["trained", "first-step"])
def test_a_nan_in_the_picture_reaches_the_loss_but_no_buffer(name, started):
    model = (trained(name) if started else build(CONFIGS[name])).train()
    image = make_image()
    image[1, 0, 3, 3] = float("nan")
    broken = model(image)
    assert broken.reconstruction.isnan().any()  # or the loss would be NaN by the picture alone
    assert tokenizer_loss(broken, image, TokenizerLossConfig()).total.isnan()
    assert all(buffer.isfinite().all() for buffer in model.buffers() if buffer.is_floating_point())
    assert all(p.isfinite().all() for p in model.parameters())
    codes = model.eval().encode(image)
    assert codes.min() >= 0
    assert codes.max() < model.codebook_size
