"""tokenizer_image/quantizers: claims that hold for every kind; the others are in test_quantizer_*.py.

Axes: B batch, h w latent grid, D length of a code vector, K codebook size.
"""

import copy

import pytest
import torch

from tests.small_quantizers import (
    CASES,
    LEARNED,
    as_map,
    latents_for,
    make,
    set_codes,
    started,
    total_loss,
)
from tokenizer_image import VQGANConfig, preset
from tokenizer_image.quantizer_config import READ_BY_KIND, QuantizerConfig
from tokenizer_image.quantizers import QUANTIZERS
from tokenizer_image.quantizers.vector import VectorQuantizer
from tokenizer_image.vqgan import VQGAN


def test_every_kind_is_here():
    assert set(READ_BY_KIND) == set(QUANTIZERS) == {QuantizerConfig(**options).kind for _, _, options in CASES.values()}


@pytest.mark.parametrize("case", CASES)
def test_lookup_gives_the_vectors_of_the_forward(case):
    quantizer = started(case)
    latents = latents_for(quantizer)
    result = quantizer(latents)
    assert torch.equal(result.codes, quantizer.nearest(latents))
    vectors = quantizer.lookup(result.codes)
    assert vectors.dtype == torch.float32
    assert vectors.shape == latents.shape
    torch.testing.assert_close(result.vectors, vectors, rtol=1e-4, atol=1e-5)
    with_gradients = quantizer(latents.clone().requires_grad_())
    torch.testing.assert_close(with_gradients.vectors, vectors, rtol=1e-4, atol=1e-5)
    if quantizer.config.kind != "residual":
        assert torch.equal(quantizer.codebook[result.codes].permute(0, 3, 1, 2), vectors)
    assert quantizer.codebook.shape == (CASES[case][1] * quantizer.config.depth, quantizer.dim)
    assert quantizer.nearest(latents[:0]).shape == (0, *result.codes.shape[1:])


@pytest.mark.parametrize("case", CASES)
def test_training_takes_the_nearest_of_the_codebook_that_was_there(case):
    quantizer = started(case)
    before = copy.deepcopy(quantizer)
    latents = latents_for(quantizer, seed=2)
    result = quantizer.train()(latents)
    assert torch.equal(result.codes, before.nearest(latents))
    if case != "gumbel":  # which decodes a sample
        torch.testing.assert_close(result.vectors, before.lookup(result.codes), rtol=1e-4, atol=1e-5)
    if case in ("vq", "vq-euclidean", "residual"):
        assert not torch.equal(quantizer.codebook, before.codebook)


@pytest.mark.parametrize("case", CASES)
def test_only_a_training_forward_changes_anything(case):
    quantizer = started(case)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    latents = latents_for(quantizer, seed=2)
    quantizer(latents)
    quantizer.train().nearest(latents)
    quantizer.lookup(quantizer.nearest(latents))
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
    assert quantizer.rewritten == make(case).rewritten == [] or case in LEARNED
    other = copy.deepcopy(quantizer)
    other.train()(latents)
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


@pytest.mark.parametrize("case", [case for case in CASES if case != "gumbel"])
def test_training_and_eval_have_the_same_losses_and_gradients(case):
    quantizer = started(case)
    outcomes = []
    for training in (False, True):
        latents = latents_for(quantizer, seed=2).requires_grad_()
        result = copy.deepcopy(quantizer).train(training)(latents)
        (result.vectors * torch.arange(result.vectors.numel()).view_as(result.vectors).cos()).sum().add(
            total_loss(result)).backward()
        outcomes.append({"gradient": latents.grad, **{name: part.value for name, part in result.losses.items()}})
    assert outcomes[0].keys() == outcomes[1].keys()
    for name in outcomes[0]:
        torch.testing.assert_close(outcomes[0][name], outcomes[1][name], rtol=1e-4, atol=1e-5)


# ---- gradients through a quantizer


@pytest.mark.parametrize("case", ["vq-euclidean", "vq-gradient-euclidean", "residual", "residual-gradient", "lfq", "simvq"])
@pytest.mark.parametrize("training", [True, False])
def test_straight_through_copies_the_gradient_once(case, training):
    quantizer = started(case, **({} if case == "lfq" else {"rotation_trick": False})).train(training)
    latents = latents_for(quantizer).requires_grad_()
    weights = torch.randn(latents.shape)
    (quantizer(latents).vectors * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights)


@pytest.mark.parametrize("case", ["vq-gradient", "vq-gradient-euclidean", "residual-gradient", "simvq"])
@pytest.mark.parametrize("rotation_trick", [True, False])
def test_the_picture_moves_latents_and_only_the_codebook_term_moves_codes(case, rotation_trick):
    quantizer = started(case, rotation_trick=rotation_trick).train()
    latents = latents_for(quantizer)
    assert not quantizer(latents).vectors.requires_grad
    result = quantizer(latents.requires_grad_())
    result.vectors.square().sum().backward(retain_graph=True)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in quantizer.parameters())
    result.losses["commit"].value.backward(retain_graph=True)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in quantizer.parameters())
    result.losses["codebook"].value.backward()
    assert all(parameter.grad.any() for parameter in quantizer.parameters())


def test_rotation_turns_the_gradient_by_hand():
    """From (2, 0) to (0, 3): a quarter turn and 1.5 times as long."""
    quantizer = make("vq-euclidean")
    quantizer = VectorQuantizer(2, 2, quantizer.config)
    set_codes(quantizer, [[0.0, 3.0], [-9.0, -9.0]])
    latents = as_map([[2.0, 0.0]]).requires_grad_()
    result = quantizer.eval()(latents)
    assert result.vectors.flatten().tolist() == pytest.approx([0.0, 3.0], abs=1e-5)
    (result.vectors * as_map([[10.0, 20.0]])).sum().backward()
    assert latents.grad.flatten().tolist() == pytest.approx([1.5 * 20, -1.5 * 10], rel=1e-5)


# ---- precision and broken numbers


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_buffers_stay_float32_and_training_goes_on_in_another_dtype(case, dtype):
    options = {"dead_code_fraction": 0.9, "ema_decay": 0.5} if case in LEARNED else {}  # restarts at each step
    quantizer = started(case, **options).to(dtype).train()
    quantizer.restarts = 0
    for seed in (3, 4):
        latents = latents_for(quantizer, seed=seed).to(dtype).requires_grad_()
        result = quantizer(latents)
        assert result.vectors.dtype == dtype
        assert all(part.value.dtype == torch.float32 for part in result.losses.values())
        (result.vectors.float().sum() + total_loss(result)).backward()
        assert torch.isfinite(latents.grad).all()
    assert quantizer.restarts > 2 or case not in LEARNED
    assert quantizer.codebook.dtype == torch.float32
    assert quantizer.lookup(result.codes).dtype == torch.float32
    assert torch.equal(quantizer.eval()(latents).codes, quantizer.nearest(latents))
    assert all(buffer.dtype == torch.float32 for buffer in quantizer.buffers() if buffer.is_floating_point())
    assert all(parameter.dtype == dtype for parameter in quantizer.parameters())


@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_nothing(case):
    quantizer = started(case)
    latents = latents_for(quantizer)
    codes, book, result = quantizer.nearest(latents), quantizer.codebook, quantizer(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.nearest(latents), codes)
        assert torch.equal(quantizer.codebook, book)
        assert torch.equal(quantizer.lookup(codes), quantizer.lookup(codes).float())
        again = quantizer(latents)
    assert torch.equal(again.vectors, result.vectors)
    assert all(torch.equal(part.value, again.losses[name].value) for name, part in result.losses.items())
    assert torch.equal(quantizer.lookup(codes), result.vectors) or case not in ("vq", "simvq")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("first_batch", [True, False])
def test_nan_in_a_latent_stays_in_its_vector(case, first_batch):
    options = {"dead_code_fraction": 0.5, "ema_decay": 0.5} if case in LEARNED else {}
    quantizer = make(case, **options) if first_batch else started(case, **options)
    latents = latents_for(quantizer)
    latents[0, :, 2, 3], latents[1, 0, 4, 4], latents[2, 1, 0, 0] = torch.nan, torch.nan, torch.inf
    latents.requires_grad_()
    result = quantizer.train()(latents)
    broken = ~torch.isfinite(result.vectors).all(dim=1)
    assert broken.nonzero().tolist() == [[0, 2, 3], [1, 4, 4], [2, 0, 0]]
    assert result.vectors[0, :, 2, 3].isnan().all()
    assert result.codes.min() >= 0
    assert result.codes.max() < quantizer.codebook_size
    assert all(torch.isfinite(part.value) for part in result.losses.values())
    (torch.where(torch.isfinite(result.vectors), result.vectors, 0).sum() + total_loss(result)).backward()
    assert torch.isfinite(latents.grad).all()
    for tensor in [*quantizer.state_dict().values(), *(parameter.grad for parameter in quantizer.parameters())]:
        assert torch.isfinite(tensor).all()
    codes = quantizer.eval().nearest(latents)
    assert torch.equal(quantizer(latents).codes, codes)
    assert codes.min() >= 0
    assert codes.max() < quantizer.codebook_size


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_quantizer_goes_on_identically(case):
    quantizer = started(case).train()
    with torch.device("meta"):  # as PretrainedModule compares shapes
        empty = make(case)
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {
        name: tensor.shape for name, tensor in quantizer.state_dict().items()}
    again = make(case).train()
    again.load_state_dict({name: tensor.clone() for name, tensor in quantizer.state_dict().items()})
    latents = latents_for(quantizer, seed=5)
    results = []
    for model in (quantizer, again):
        torch.manual_seed(1)
        results.append(model(latents))
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].vectors, results[1].vectors)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in quantizer.state_dict().items())


@pytest.mark.parametrize("kind", sorted(READ_BY_KIND))
def test_a_tokenizer_with_each_kind_trains_and_is_saved_and_loaded(kind, tmp_path):
    sizes = {"fsq": {"embed_dim": 3, "codebook_size": 60}, "lfq": {"embed_dim": 6, "codebook_size": 64}}.get(kind, {})
    options = {"kind": kind, **{"fsq": {"levels": [3, 4, 5]}, "residual": {"depth": 2}}.get(kind, {})}
    model = VQGAN(VQGANConfig.parse({**preset("debug").plain(), **sizes, "quantizer": options}, "test")).train()
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    result = model(image)
    assert result.codes.shape == (2, *model.grid)
    (result.reconstruction.square().mean() + sum(part.value * part.weight for part in result.losses.values())).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or (not p.grad.any() and ".k.bias" not in name)]
    model.eval().save_pretrained(tmp_path / "m")
    loaded = VQGAN.from_pretrained(tmp_path / "m")
    codes = model.encode(image)
    assert torch.equal(loaded.encode(image), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    torch.testing.assert_close(model.decode(codes), model(image).reconstruction.clamp(-1, 1), rtol=1e-4, atol=1e-4)
