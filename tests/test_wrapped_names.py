"""Wrappers' parts of names come off in any order and number; the model's own parts stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inference.checkpoints import ConvertOptions, convert
from tests import llamagen_reference
from tests.llamagen_files import CLASSES
from tests.vqgan_references import Shape, make_state
from tokenloom_common.errors import UserError

SHAPE = Shape(multipliers=(1,), attention=(), dim=4, codes=16)
PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "_forward_module.",
            "_forward_module.module._orig_mod.", "model.", "model.module.", "module.model.", "model._orig_mod.model.",
            "first_stage_model.", "module.first_stage_model.", "first_stage_model.module.", "first_stage_model._orig_mod.",
            "model.first_stage_model._forward_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module.",
            "_orig_mod._orig_mod.module.module.vqvae.", "lightning_module.net._orig_mod."]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return make_state(SHAPE)


def assert_converts(path, state: dict[str, Tensor], kind: str | None = "taming") -> None:
    part = convert(kind, path, ConvertOptions(resolution=8))
    assert all(torch.equal(part.weights[name], tensor) for name, tensor in state.items())
    assert part.notes == ()


@pytest.mark.long
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", ["state_dict", "model", None])
def test_every_order_of_prefixes_comes_off(tmp_path, state, prefix, container):
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({container: wrapped} if container else wrapped, tmp_path / "x.ckpt")
    assert_converts(tmp_path / "x.ckpt", state)
    assert_converts(tmp_path / "x.ckpt", state, kind=None)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.",
                                     "_forward_module.module."])
def test_modules_within_may_be_wrapped(tmp_path, state, wrapper):
    wrapped = {f"module.{name}".replace("encoder.", f"encoder.{wrapper}").replace(".weight", f".{wrapper}weight"): tensor
               for name, tensor in state.items()}
    torch.save({"state_dict": wrapped}, tmp_path / "x.ckpt")
    assert_converts(tmp_path / "x.ckpt", state)


def test_only_some_names_may_be_wrapped(tmp_path, state):
    """As where only the encoder was compiled, and a loss stands beside."""
    wrapped = {name.replace("decoder.", "decoder._orig_mod."): tensor for name, tensor in state.items()}
    torch.save({"state_dict": {**wrapped, "loss.module.weight": torch.zeros(2)}}, tmp_path / "x.ckpt")
    assert_converts(tmp_path / "x.ckpt", state)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.module.", "_forward_module."])
def test_two_tensors_that_would_get_one_name_are_refused(tmp_path, state, wrapper):
    torch.save({"model": {**state, f"{wrapper}quant_conv.bias": torch.ones(4)}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"holds quant_conv\.bias twice, with and without a wrapper's prefix"):
        convert("taming", tmp_path / "x.pt")


def test_parts_of_a_larger_model_keep_apart(tmp_path, state):
    """A language model's names begin with `model.` by themselves, and its other parts are left out."""
    beside = {"model.language_model.layers.0.mlp.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2),
              "model.module_list.0.weight": torch.zeros(2), "first_stage_models.conv.weight": torch.zeros(2)}
    for prefix in ("first_stage_model.", "model.vae.", "model.module.vqvae."):
        wrapped = {prefix + name: tensor for name, tensor in state.items()}
        torch.save({"state_dict": {**beside, **wrapped}}, tmp_path / "x.ckpt")
        part = convert("taming", tmp_path / "x.ckpt", ConvertOptions(resolution=8))
        assert part.weights.keys() == state.keys()


def test_a_conditions_tokenizer_is_not_taken_for_the_images(tmp_path, state):
    other = make_state(SHAPE, seed=1)
    both = {**{f"cond_stage_model.{name}": tensor for name, tensor in other.items()},
            **{f"first_stage_model.{name}": tensor for name, tensor in state.items()}}
    torch.save({"state_dict": both}, tmp_path / "x.ckpt")
    part = convert("taming", tmp_path / "x.ckpt", ConvertOptions(resolution=8))
    assert torch.equal(part.weights["quant_conv.bias"], state["quant_conv.bias"])
    assert "also there: `state_dict.cond_stage_model`" in part.notes[0]


@pytest.mark.parametrize("prefix", ["module.module.", "_forward_module.", "_orig_mod.model.", "model.module."])
def test_a_transformers_names_are_unwrapped_alike(tmp_path, prefix):
    state = llamagen_reference.make_state(CLASSES)
    torch.save({"model": {prefix + name: tensor for name, tensor in state.items()}}, tmp_path / "c2i.pt")
    (tmp_path / "heads.yaml").write_text(f"n_head: {CLASSES.heads}\n")
    part = convert("llamagen-gpt", tmp_path / "c2i.pt", ConvertOptions(tmp_path / "heads.yaml", resolution=64))
    assert part.weights.keys() == state.keys()
