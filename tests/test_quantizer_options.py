"""tokenizer_image/quantizer_config.py: every option is read by its kind or refused."""

import pytest
import torch

from tests.small_quantizers import RAW_SEARCH, latents_for, make, total_loss
from tokenizer_image import VQGANConfig, preset
from tokenizer_image.quantizer_config import READ_BY_KIND, QuantizerConfig
from tokenloom_common.errors import UserError

# ---- options

OTHER_VALUES = {  # a value that no base below has
    "l2_normalize": False, "commitment_weight": 2.0, "learn_codebook_by_gradient": True, "ema_decay": 0.5,
    "dead_code_fraction": 0.9, "kmeans_init": False, "kmeans_iterations": 1, "rotation_trick": False, "depth": 3,
    "levels": (5, 4, 3), "entropy_weight": 0.7, "diversity_gamma": 0.2, "entropy_temperature": 0.5, "spherical": True,
    "raw_search": True, "kl_weight": 0.3, "temperature_start": 2.0, "temperature_end": 0.5, "temperature_steps": 2,
    "straight_through": False}
BASES = {"vq": "vq", "residual": "residual", "fsq": "fsq", "lfq": "lfq", "simvq": "simvq", "gumbel": "gumbel"}


def outcome(kind: str, **changes) -> list[float]:
    """What three training steps on learned latents leave behind."""
    options = {**({"depth": 2} if kind == "residual" else {}), **changes}
    quantizer = make(BASES[kind], **options).train()
    latents = latents_for(quantizer, batch=8, side=4).requires_grad_()
    optimizer = torch.optim.SGD([latents, *quantizer.parameters()], lr=0.1)
    for step in range(3):
        quantizer.set_step(step, 3)
        result = quantizer(latents)
        optimizer.zero_grad()
        (total_loss(result) + (result.vectors * torch.arange(latents.numel()).view_as(latents).cos()).sum()).backward()
        optimizer.step()
    left = (result.vectors, latents, quantizer.codebook, total_loss(result))
    return [float(tensor.detach().double().sum()) for tensor in left]


@pytest.mark.parametrize(("kind", "option"), [
    (kind, option) for kind, names in READ_BY_KIND.items() for option in sorted(names)])
def test_each_option_that_a_kind_reads_changes_its_training(kind, option):
    needed = {name: value for name, value in RAW_SEARCH.items() if name != "raw_search"} if option == "raw_search" else {}
    assert outcome(kind, **needed) == outcome(kind, **needed)
    assert outcome(kind, **needed, **{option: OTHER_VALUES[option]}) != outcome(kind, **needed)


@pytest.mark.parametrize("kind", sorted(READ_BY_KIND))
def test_options_that_a_kind_does_not_read_are_refused(kind):
    options = set(QuantizerConfig.model_fields) - {"kind"}
    assert options == set(OTHER_VALUES) == set().union(*READ_BY_KIND.values())
    needed = {"fsq": {"levels": (3, 4, 5)}, "residual": {"depth": 2}}.get(kind, {})
    for option in options - READ_BY_KIND[kind]:
        with pytest.raises(UserError) as raised:
            QuantizerConfig.parse({"kind": kind, **needed, option: OTHER_VALUES[option]}, "config.json")
        readers = [other for other, names in READ_BY_KIND.items() if option in names]
        assert str(raised.value) == (f"config.json: kind '{kind}' does not read {option} "
                                     f"(kinds that do: {', '.join(readers)}); leave it out")
    QuantizerConfig.parse({**QuantizerConfig(kind=kind, **needed).plain()}, "config.json")  # defaults may be written out


@pytest.mark.parametrize(("values", "message"), [
    ({"kind": "vqq"}, "kind: .*got 'vqq'"),
    ({"kind": "fsq"}, r"kind 'fsq' needs levels, for example \[8, 5, 5, 5\]"),
    ({"kind": "fsq", "levels": [8, 2]}, "levels.1: .*greater than or equal to 3, got 2"),
    ({"kind": "fsq", "levels": [65]}, "levels.0: .*got 65"),
    ({"kind": "fsq", "levels": 8}, "levels: .*got 8"),
    ({"kind": "residual"}, "kind 'residual' with depth 1 is plain vq; use depth 2 or more"),
    ({"kind": "residual", "depth": 33}, "depth: .*got 33"),
    ({"depth": 2}, "kind 'vq' does not read depth"),
    ({"commitment_weight": -1.0}, "commitment_weight: .*got -1.0"),
    ({"commitment_weight": float("nan")}, "commitment_weight: .*got nan"),
    ({"ema_decay": 1.0}, "ema_decay: .*got 1.0"),
    ({"kind": "lfq", "entropy_temperature": 0}, "entropy_temperature: .*got 0"),
    ({"kmeans_iterations": 0}, "kmeans_iterations: .*got 0"),
    ({"raw_search": True}, "raw_search needs vectors that keep their own lengths.*set l2_normalize and learn_codebook_by_gr"),
    ({**RAW_SEARCH, "l2_normalize": False}, "raw_search needs vectors that keep their own lengths"),
    ({**RAW_SEARCH, "kmeans_init": True}, "raw_search compares lengths.*set kmeans_init false and dead_code_fraction 0"),
    ({**RAW_SEARCH, "dead_code_fraction": 0.1}, "raw_search compares lengths"),
    ({"raw_search": "some"}, "raw_search: .*got 'some'"),
    ({"kind": "gumbel", "temperature_end": 2.0}, "temperature_end 2.0 is above temperature_start 1.0"),
    ({"kind": "gumbel", "temperature_start": 0}, "temperature_start: .*got 0"),
    ({"kind": "gumbel", "temperature_steps": -1}, "temperature_steps: .*got -1"),
    ({"kind": "gumbel", "kl_weight": -1.0}, "kl_weight: .*got -1.0"),
    ({"kind": "gumbel", "straight_through": 2}, "straight_through: .*got 2"),
    ({"dept": 2}, "unknown key 'dept'; did you mean 'depth'")])
def test_impossible_options_are_refused_in_one_line(values, message):
    with pytest.raises(UserError, match=f"^here: {message}") as raised:
        QuantizerConfig.parse(values, "here")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("change", "message"), [
    ({"embed_dim": 4, "codebook_size": 60, "quantizer": {"kind": "fsq", "levels": [3, 4, 5]}},
     "quantizer.levels [3, 4, 5] give embed_dim 3 and codebook_size 60, got 4 and 60; set them to that"),
    ({"embed_dim": 3, "codebook_size": 64, "quantizer": {"kind": "fsq", "levels": [3, 4, 5]}},
     "quantizer.levels [3, 4, 5] give embed_dim 3 and codebook_size 60, got 3 and 64; set them to that"),
    ({"embed_dim": 6, "codebook_size": 32, "quantizer": {"kind": "lfq"}},
     "kind 'lfq' has 2^embed_dim codes: embed_dim 6 gives codebook_size 64, got 32; "
     "set embed_dim to log2 of the codebook_size that you want"),
    ({"embed_dim": 1}, "embed_dim 1 leaves two directions with quantizer.l2_normalize; use 8, or at least 2")])
def test_sizes_that_do_not_fit_are_refused_with_the_sizes_that_do(change, message):
    with pytest.raises(UserError) as raised:
        VQGANConfig.parse({**preset("debug").plain(), **change}, "config.json")
    assert str(raised.value) == f"config.json: {message}"
