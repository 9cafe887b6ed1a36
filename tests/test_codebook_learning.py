"""tokenizer_image/quantizers: codebooks that learn by gradient or by moving average, on one process and on two."""

import itertools
import warnings

import pytest
import torch
import torch.multiprocessing as mp

from tests.small_quantizers import (
    CASES,
    LEARNED,
    as_map,
    as_rows,
    latents_for,
    make,
    set_codes,
    started,
    total_loss,
)
from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers import build_quantizer
from tokenizer_image.quantizers.vector import VectorQuantizer

# ---- codebooks learned by gradient


def test_codebook_by_gradient_on_the_sphere_by_hand():
    config = QuantizerConfig(learn_codebook_by_gradient=True, kmeans_init=False, dead_code_fraction=0, commitment_weight=0.25)
    quantizer = VectorQuantizer(2, 2, config).train()
    set_codes(quantizer, [[3.0, 0.0], [0.0, 5.0]])
    assert isinstance(quantizer.vq._codebook.embed, torch.nn.Parameter)
    assert quantizer.codebook.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert quantizer.lookup(torch.tensor([[[1]]])).flatten().tolist() == [0.0, 1.0]
    latents = as_map([[1.2, 1.6]]).requires_grad_()  # (0.6, 0.8) on the circle
    result = quantizer(latents)
    assert result.codes.item() == 1
    assert result.vectors.flatten().tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert result.losses["commit"].value.item() == pytest.approx((0.36 + 0.04) / 2)
    assert result.losses["codebook"].value.item() == pytest.approx((0.36 + 0.04) / 2)
    assert {name: part.weight for name, part in result.losses.items()} == {"commit": 0.25, "codebook": 1.0}
    total_loss(result).backward()
    gradient = quantizer.vq._codebook.embed.grad[0]
    assert gradient[0].tolist() == [0.0, 0.0]
    assert gradient[1].tolist() == pytest.approx([-0.6 / 5, 0.0], abs=1e-6)  # (e - z) across e, over e's length
    # 0.25 (z - e) = (0.15, -0.05) across z = (0.6, 0.8), over the latent's length 2
    along = 0.15 * 0.6 - 0.05 * 0.8
    assert latents.grad.flatten().tolist() == pytest.approx([(0.15 - along * 0.6) / 2, (-0.05 - along * 0.8) / 2], abs=1e-6)


@pytest.mark.parametrize("case", ["vq-gradient", "vq-gradient-euclidean", "residual-gradient", "simvq"])
def test_commitment_weight_0_leaves_the_codebook_learning(case):
    quantizer = started(case, commitment_weight=0.0).train()
    latents = latents_for(quantizer).requires_grad_()
    total_loss(quantizer(latents)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())
    assert latents.grad is None or not latents.grad.any()


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("fsq", "gumbel")])
def test_commitment_weight_scales_one_term_only(case):
    weights = []
    for weight in (0.0, 0.5):
        quantizer = make(case, commitment_weight=weight).train()
        weights.append({name: part.weight for name, part in quantizer(latents_for(quantizer)).losses.items()})
    assert weights[0] == {**weights[1], "commit": 0.0}
    assert weights[1]["commit"] == 0.5


@pytest.mark.parametrize("case", ["vq-gradient", "residual-gradient"])
def test_codebooks_that_kmeans_and_restarts_rewrote_are_named_once(case):
    quantizer = make(case, dead_code_fraction=0.0).train()
    quantizer(latents_for(quantizer))
    assert [id(p) for p in quantizer.rewritten] == [id(p) for p in quantizer.parameters()]
    quantizer.rewritten = []
    quantizer(latents_for(quantizer))
    assert quantizer.rewritten == []
    quantizer = make(case, dead_code_fraction=0.9, ema_decay=0.0).train()
    quantizer(latents_for(quantizer))
    quantizer.rewritten, quantizer.restarts = [], 0
    for seed in range(3):
        quantizer(latents_for(quantizer, batch=1, seed=seed))  # restarts at each step
    assert quantizer.restarts > 10
    assert [id(p) for p in quantizer.rewritten] == [id(p) for p in quantizer.parameters()]
    following = make(case.removesuffix("-gradient"), dead_code_fraction=0.9, ema_decay=0.0).train()
    following(latents_for(following))
    assert following.rewritten == []  # buffers are nobody's parameters


@pytest.mark.parametrize("case", ["vq-gradient", "vq-gradient-euclidean"])
def test_gradients_are_those_of_the_codes_before_they_restarted(case):
    restarting = started(case, dead_code_fraction=0.9, ema_decay=0.5).train()
    staying = make(case, dead_code_fraction=0.0).train()
    staying.load_state_dict(restarting.state_dict())
    restarting.restarts = 0
    for quantizer in (restarting, staying):
        total_loss(quantizer(latents_for(quantizer, seed=7))).backward()
    assert restarting.restarts > 2
    assert not torch.equal(restarting.codebook, staying.codebook)
    torch.testing.assert_close(restarting.vq._codebook.embed.grad, staying.vq._codebook.embed.grad)


# ---- codebooks that follow their latents


def test_moving_average_of_one_step_by_hand():
    config = QuantizerConfig(l2_normalize=False, ema_decay=0.75, kmeans_init=False, dead_code_fraction=0)
    quantizer = VectorQuantizer(1, 3, config).train()
    set_codes(quantizer, [[0.0], [10.0], [99.0]])
    result = quantizer(as_map([[1.0], [2.0], [3.0], [8.0]]))
    assert result.codes.tolist() == [[[0, 0, 0, 1]]]
    book = quantizer.vq._codebook
    assert book.cluster_size[0].tolist() == [0.75 + 0.25 * 3, 0.75 + 0.25, 0.75]
    assert book.embed_avg[0, :, 0].tolist() == [0.25 * 6, 0.75 * 10 + 0.25 * 8, 0.75 * 99]
    assert quantizer.codebook[:, 0].tolist() == pytest.approx([1.5 / 1.5, 9.5, 99.0])
    assert result.losses["commit"].value.item() == pytest.approx((1 + 4 + 9 + 4) / 4)  # to the codes before
    assert "codebook" not in result.losses


def test_moving_average_on_the_sphere_by_hand():
    quantizer = VectorQuantizer(2, 2, QuantizerConfig(ema_decay=0.5, kmeans_init=False, dead_code_fraction=0)).train()
    set_codes(quantizer, [[1.0, 0.0], [0.0, 1.0]])
    quantizer(as_map([[8.0, 6.0], [0.3, 0.4]]))  # (0.8, 0.6) and (0.6, 0.8): one for each code
    expected = torch.tensor([[1.8, 0.6], [0.6, 1.8]])
    torch.testing.assert_close(quantizer.codebook, expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_a_code_out_of_use_stays_where_it_is(l2_normalize):
    config = QuantizerConfig(l2_normalize=l2_normalize, ema_decay=0.5, kmeans_init=False, dead_code_fraction=0)
    quantizer = VectorQuantizer(2, 2, config).train()
    set_codes(quantizer, [[1.0, 0.0], [-0.6, -0.8]])
    for _ in range(200):
        quantizer(as_map([[1.0, 0.1]]))
    torch.testing.assert_close(quantizer.codebook[1], torch.tensor([-0.6, -0.8]))
    quantizer(as_map([[-1.0, 0.0]]))  # and comes back into use
    torch.testing.assert_close(quantizer.codebook[1], torch.tensor([-1.0, 0.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", LEARNED)
def test_kmeans_of_fewer_latents_than_codes_leaves_no_code_at_0(case):
    quantizer = make(case, dead_code_fraction=0.0).train()
    latents = latents_for(quantizer, batch=1, side=3)
    quantizer(latents)
    assert quantizer.codebook[:CASES[case][1]].norm(dim=1).min() > 0.1
    if quantizer.config.kind == "vq":
        chosen = torch.as_tensor(as_rows(quantizer.lookup(quantizer.nearest(latents))))
        target = torch.as_tensor(as_rows(latents))
        target = target / target.norm(dim=1, keepdim=True) if quantizer.config.l2_normalize else target
        torch.testing.assert_close(chosen, target, rtol=1e-4, atol=1e-4)  # every latent has its own code


def test_kmeans_finds_separate_clusters():
    config = QuantizerConfig(l2_normalize=False, dead_code_fraction=0, ema_decay=0.5)
    torch.manual_seed(4)
    quantizer = VectorQuantizer(1, 2, config).train()
    quantizer(as_map([[0.0], [1.0], [10.0], [11.0], [12.0]]))
    assert sorted(quantizer.codebook[:, 0].tolist()) == pytest.approx([0.5, 11.0])


@pytest.mark.parametrize("case", ["vq", "vq-euclidean", "vq-gradient", "vq-gradient-euclidean"])
def test_dead_codes_restart_at_latents_and_are_counted(case):
    """mean use 16/8 = 2 latents, so codes with under 1 are dead: the five that are far from every latent."""
    config = QuantizerConfig(**CASES[case][2], ema_decay=0.0, dead_code_fraction=0.5, kmeans_init=False)
    quantizer = VectorQuantizer(2, 8, config).train()
    angles = torch.tensor([0.0, 0.1, 0.2, 3.0, 3.1, 3.2, 3.3, 3.4])
    set_codes(quantizer, torch.stack([angles.cos(), angles.sin()], dim=1).tolist())
    around = torch.linspace(-0.05, 0.25, 16)
    latents = torch.stack([around.cos(), around.sin()], dim=1)
    quantizer(as_map(latents.tolist()))
    assert quantizer.restarts == 5
    away = torch.cdist(quantizer.codebook[3:], latents).min(dim=1).values
    assert away.max() < 1e-3
    assert quantizer.codebook[3:].unique(dim=0).shape == (5, 2)
    quantizer(as_map(latents.tolist()))
    assert quantizer.restarts - 5 <= 3  # the new ones are in use; it adds up


@pytest.mark.parametrize("case", LEARNED)
def test_no_more_codes_restart_than_there_are_latents(case):
    quantizer = make(case, ema_decay=0.0, dead_code_fraction=0.5, kmeans_init=False).train()
    quantizer(latents_for(quantizer, batch=1, side=2))  # 4 latents, at least 12 dead codes
    assert quantizer.restarts == 4 * quantizer.config.depth
    assert all(layer.restarts == 0 for layer in getattr(quantizer, "layers", []))


def test_codes_in_use_are_not_restarted_at_the_first_step():
    """The averages start at 1; a share of the mean use of 100 would call codes dead that a large batch uses evenly."""
    quantizer = VectorQuantizer(1, 4, QuantizerConfig(l2_normalize=False, kmeans_init=False)).train()
    set_codes(quantizer, [[0.0], [1.0], [2.0], [3.0]])
    rows = [[float(code)] for code in range(4) for _ in range(100)]
    for _ in range(3):
        quantizer(as_map(rows))
    assert quantizer.restarts == 0
    for _ in range(1500):
        quantizer(as_map(rows[:10]))  # until the other three are below 0.03 of the mean use
        if quantizer.restarts:
            break
    assert quantizer.restarts == 3


def test_a_restarted_code_gets_time_to_be_found():
    """It starts with the mean use, so that it is under half of it after 7 steps out of use, not after one."""
    config = QuantizerConfig(l2_normalize=False, kmeans_init=False, ema_decay=0.9, dead_code_fraction=0.5)
    quantizer = VectorQuantizer(1, 2, config).train()
    set_codes(quantizer, [[0.0], [99.0]])
    same = as_map([[0.5]] * 8)  # code 0 takes them all, also from a code that was put on the same place
    restarts = []
    for _ in range(40):
        quantizer(same)
        restarts.append(quantizer.restarts)
        if quantizer.restarts:
            assert quantizer.codebook[1].item() == pytest.approx(0.5)  # and its average is that of its new place
        quantizer.vq._codebook.embed[0, 0] = 0.5
    steps = [step for step, count in enumerate(restarts) if count > (restarts[step - 1] if step else 0)]
    assert len(steps) > 3
    assert {later - earlier for earlier, later in itertools.pairwise(steps[1:])} == {7}  # while the mean rises, 8


# ---- several processes

TWO = {
    "vq": {"dead_code_fraction": 0.9, "ema_decay": 0.5},  # many codes restarted at each step
    "vq-random": {"kmeans_init": False, "dead_code_fraction": 0},  # none, so that the random start stays
    "residual": {"kind": "residual", "depth": 2, "dead_code_fraction": 0.9, "ema_decay": 0.5},
    "gradient": {"learn_codebook_by_gradient": True, "dead_code_fraction": 0.9, "ema_decay": 0.5},
    "gradient-random": {"learn_codebook_by_gradient": True, "kmeans_init": False, "dead_code_fraction": 0},
    "lfq": {"kind": "lfq", "entropy_temperature": 1.0},
}


def _latents_of_rank(rank: int, step: int) -> torch.Tensor:
    return torch.randn(8, 6, 4, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def _train_one_rank(rank: int, world: int, store: str, folder: str) -> None:
    warnings.simplefilter("error")  # a collective that autograd does not know warns
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(100 + rank)  # ranks differ in everything random, as in a careless launch
    for name, options in TWO.items():
        quantizer = build_quantizer(6, 64, QuantizerConfig(**options)).train()
        rewritten = []
        for step in range(4):
            latents = _latents_of_rank(rank, step).requires_grad_()
            result = quantizer(latents)
            total_loss(result).backward()
            for parameter in quantizer.parameters():
                torch.distributed.all_reduce(parameter.grad)
                parameter.data -= 0.1 * parameter.grad / world
                parameter.grad = None
            rewritten.append(len(quantizer.rewritten))
            quantizer.rewritten = []
        values = {part: loss.value.detach() for part, loss in result.losses.items()}
        torch.save({"state": quantizer.state_dict(), "restarts": quantizer.restarts, "rewritten": rewritten, "losses": values,
                    "gradient": latents.grad}, f"{folder}/{name}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_keep_one_codebook(tmp_path):
    mp.spawn(_train_one_rank, args=(2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    saved = {name: [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)] for name in TWO}
    for name, (first, second) in saved.items():
        assert first["state"].keys() == second["state"].keys()
        assert all(torch.equal(first["state"][key], second["state"][key]) for key in first["state"]), name
        assert first["restarts"] == second["restarts"]
        assert first["rewritten"] == second["rewritten"]
        for key, tensor in first["state"].items():
            if key.endswith("_codebook.embed"):
                assert tensor[0].unique(dim=0).shape[0] > 56, name  # distinct codes, drawn from both ranks
            if key.endswith("initted"):
                assert tensor
    assert saved["vq"][0]["restarts"] > 10
    assert saved["residual"][0]["restarts"] > 10
    assert saved["gradient"][0]["restarts"] > 10
    assert saved["gradient"][0]["rewritten"][0] == 1  # k-means
    assert saved["gradient-random"][0]["rewritten"] == [1, 0, 0, 0]  # rank 1 took over rank 0's
    # lfq: the entropy of both batches together, and gradients whose mean over the ranks is its gradient
    latents = torch.cat([_latents_of_rank(rank, 3) for rank in (0, 1)]).requires_grad_()
    both = build_quantizer(6, 64, QuantizerConfig(**TWO["lfq"])).train()(latents)
    total_loss(both).backward()
    for rank, one in enumerate(saved["lfq"]):
        torch.testing.assert_close(one["losses"]["batch_entropy"], both.losses["batch_entropy"].value.detach())
        torch.testing.assert_close(one["gradient"] / 2, latents.grad[8 * rank:8 * rank + 8], rtol=1e-4, atol=1e-7)
