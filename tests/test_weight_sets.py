"""Of a file with several sets of weights (raw and averages) one is taken, whole, and the note says which."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tokenloom
from inference.checkpoints import ConvertOptions, convert, export_checkpoint, from_checkpoint
from tests import llamagen_reference, tiny
from tests.llamagen_files import CLASSES
from tests.vqgan_references import Shape, make_state
from tokenloom_common.errors import UserError

SHAPE = Shape(multipliers=(1,), attention=(), dim=4, codes=16)
LLAMAGEN = Shape(multipliers=(1,), attention=(), names="llamagen", dim=4, codes=16)
SIDE = 8
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def raw() -> State:
    return make_state(SHAPE, seed=1)


@pytest.fixture(scope="module")
def average() -> State:
    return make_state(SHAPE, seed=2)


def below(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def dotless(state: State, lead: str = "") -> State:
    """As latent diffusion's LitEma keeps its averages, with its counters."""
    short = {(lead + name).replace(".", ""): tensor for name, tensor in state.items()}
    return {**short, "decay": torch.tensor(0.999), "num_updates": torch.tensor(5)}


def pytorch_ema(raw: State, average: State) -> State:
    """As the module of ema-pytorch keeps both."""
    return {"initted": torch.tensor([True]), "step": torch.tensor([9]), **below("online_model.", raw),
            **below("ema_model.", average)}


def taken(source: Path, **options) -> tuple[str, tuple[str, ...]]:
    """Convert -> (which set all tensors come from, notes without the resolution's)."""
    part = convert("taming", source, ConvertOptions(resolution=SIDE, **options))
    both = {"raw": make_state(SHAPE, seed=1), "average": make_state(SHAPE, seed=2)}
    found = [name for name, state in both.items()
             if all(torch.equal(part.weights[key], tensor) for key, tensor in state.items())]
    assert len(found) == 1, "tensors of two sets are mixed"
    return found[0], part.notes


TWO_SETS: dict[str, tuple[Callable[[State, State], dict], str, str]] = {
    "containers": (lambda r, a: {"model": r, "ema": a}, "ema", "model"),
    "beside lightning's": (lambda r, a: {"state_dict": r, "ema_state_dict": a, "epoch": 3}, "ema_state_dict", "state_dict"),
    "average before": (lambda r, a: {"state_dict_ema": a, "state_dict": r}, "state_dict_ema", "state_dict"),
    "gan": (lambda r, a: {"g": r, "d": {"main.weight": torch.zeros(2)}, "g_ema": a}, "g_ema", "g"),
    "named after the model": (lambda r, a: {"vqgan": r, "vqganEma": a}, "vqganEma", "vqgan"),
    "nested": (lambda r, a: {"model": {"state_dict": r}, "ema": {"state_dict": a, "decay": 0.99}},
               "ema.state_dict", "model.state_dict"),
    "wrapped differently": (lambda r, a: {"model": below("module._orig_mod.", r), "ema": a}, "ema", "model"),
    "averaged model of torch": (lambda r, a: {"model": r, "swa_model": {"n_averaged": torch.tensor(4), **below("module.", a)}},
                                "swa_model", "model"),
    "callback": (lambda r, a: {"state_dict": r, "callbacks": {"EMACallback": {"ema_weights": a}}},
                 "callbacks.EMACallback.ema_weights", "state_dict"),
    "lightning's averaging": (lambda r, a: {"state_dict": a, "current_model_state": r,
                                            "averaging_state": {"n_averaged": torch.tensor(4)}},
                              "state_dict", "current_model_state"),
    "prefixes": (lambda r, a: {"state_dict": {**below("vqgan.", r), **below("vqgan_ema.", a)}},
                 "state_dict.vqgan_ema", "state_dict.vqgan"),
    "average's prefix alone": (lambda r, a: {"state_dict": {**r, **below("ema.", a)}}, "state_dict.ema", "state_dict"),
    "flat": (lambda r, a: {**below("model.", r), **below("model_ema.", a)}, "model_ema", "model"),
    "ema-pytorch": (pytorch_ema, "ema_model", "online_model"),
    "ema-pytorch beside": (lambda r, a: {"ema": pytorch_ema(r, a), "opt": {"exp_avg": r}}, "ema.ema_model", "ema.online_model"),
    "without dots": (
        lambda r, a: {"state_dict": {**r, **below("model_ema.", dotless(a))}}, "state_dict.model_ema", "state_dict"),
    "without dots, of a module": (
        lambda r, a: {"state_dict": {**below("vqvae.", r), **below("model_ema.", dotless(a))}},
        "state_dict.model_ema", "state_dict.vqvae"),
    "without dots, of the whole": (
        lambda r, a: {"state_dict": {**below("vqvae.", r), **below("ema.", dotless(a, "vqvae"))}},
        "state_dict.ema", "state_dict.vqvae"),
    "without dots, wrapped": (
        lambda r, a: {"state_dict": {**below("_orig_mod.", r), **below("module.model_ema.", dotless(a, "_orig_mod"))}},
        "state_dict.model_ema", "state_dict"),
    "without dots, container": (lambda r, a: {"model": r, "litema": {"x": 1}, "model_ema": dotless(a)}, "model_ema", "model"),
}


@pytest.mark.long
@pytest.mark.parametrize("case", TWO_SETS)
def test_the_average_is_taken_and_the_option_takes_the_other(tmp_path, raw, average, case):
    make, of_average, of_raw = TWO_SETS[case]
    torch.save(make(raw, average), tmp_path / "x.ckpt")
    found, notes = taken(tmp_path / "x.ckpt")
    assert found == "average"
    shown = f"`{of_raw}`" if of_raw else "the top level"
    assert notes == (f"x.ckpt: took the average `{of_average}`; also there: {shown} (--weight-set raw)",)
    for wanted in ("raw", of_raw):
        found, notes = taken(tmp_path / "x.ckpt", weight_set=wanted)
        assert found == "raw"
        assert notes == (f"x.ckpt: took the raw weights {shown}; also there: `{of_average}` (--weight-set ema)",)
    for wanted in ("ema", of_average):
        assert taken(tmp_path / "x.ckpt", weight_set=wanted)[0] == "average"
    assert convert(None, tmp_path / "x.ckpt", ConvertOptions(resolution=SIDE)).notes[0].startswith("x.ckpt: took the average")


@pytest.mark.parametrize("payload", [
    lambda s: {"state_dict": s, "optimizer": {"exp_avg": s}, "g_optim": {"ema": s}},
    lambda s: {"ema": s, "steps": 3}, lambda s: {"online": below("ema_model.", s)}, lambda s: s,
    lambda s: {"model": s, "state_dict": s}, lambda s: {"model": s, "ema": dict(s)},
    lambda s: {"state_dict": {**s, **below("loss.ema.", make_state(SHAPE, seed=3)),
                              **below("model_ema.", {"diffusion_modelconv": torch.zeros(2)})}},
    lambda s: {"schema": {"a": torch.zeros(2)}, "weights": s}],
    ids=["optimizer", "average alone", "prefix alone", "bare", "one dict twice", "same tensors", "other networks", "schema"])
def test_a_file_with_one_set_has_no_note(tmp_path, raw, payload):
    torch.save(payload(raw), tmp_path / "x.ckpt")
    assert taken(tmp_path / "x.ckpt") == ("raw", ())


def test_safetensors_may_hold_two_sets_too(tmp_path, raw, average):
    save_file(pytorch_ema(raw, average), tmp_path / "x.safetensors")
    assert taken(tmp_path / "x.safetensors")[0] == "average"
    assert taken(tmp_path / "x.safetensors", weight_set="raw")[0] == "raw"
    save_file({name: tensor for name, tensor in raw.items() if "bias" not in name}, tmp_path / "1.safetensors")
    both = {**{name: tensor for name, tensor in raw.items() if "bias" in name}, **below("ema.", average)}
    save_file(both, tmp_path / "2.safetensors")
    index = {"weight_map": {name: f"{2 if name in both else 1}.safetensors" for name in [*raw, *both]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert taken(tmp_path / "model.safetensors.index.json")[0] == "average"


def test_of_three_sets_any_is_taken_by_its_name(tmp_path, raw, average):
    torch.save({"model": raw, "ema_0.999": average, "ema_0.9 fast": make_state(SHAPE, seed=3)}, tmp_path / "x.pt")
    found, notes = taken(tmp_path / "x.pt")
    assert found == "average"
    assert notes == ("x.pt: took the average `ema_0.999`; also there: `model` (--weight-set raw), "
                     "`ema_0.9 fast` (--weight-set 'ema_0.9 fast')",)
    part = convert("taming", tmp_path / "x.pt", ConvertOptions(resolution=SIDE, weight_set="ema_0.9 fast"))
    assert torch.equal(part.weights["quant_conv.bias"], make_state(SHAPE, seed=3)["quant_conv.bias"])
    torch.save({"student": raw, "teacher": average}, tmp_path / "y.pt")
    assert taken(tmp_path / "y.pt") == (
        "raw", ("y.pt: took the raw weights `student`; also there: `teacher` (--weight-set teacher)",))
    assert taken(tmp_path / "y.pt", weight_set="teacher")[0] == "average"


# ---- what is not there

@pytest.mark.parametrize(("payload", "wanted", "words"), [
    (lambda r, a: {"model": r}, "ema", "holds one set of weights only, `model`; leave --weight-set out"),
    (lambda r, a: r, "raw", "holds one set of weights only, the top level; leave"),
    (lambda r, a: {"ema": a}, "raw", "holds one set of weights only, `ema`; leave"),
    (lambda r, a: {"model": r, "ema": a}, "average", "holds no such set of weights; it holds `model` (raw), `ema` (ema)"),
    (lambda r, a: {"student": r, "teacher": a}, "ema", "it holds `student` (raw), `teacher` (raw)"),
    (lambda r, a: {"model": r, "ema": {"shadow_params": list(a.values())}}, "ema",
     "`model` (raw), `ema.shadow_params`, an average without names, which is not converted")])
def test_a_set_that_is_not_there_is_refused_with_a_list(tmp_path, capsys, raw, average, payload, wanted, words):
    torch.save(payload(raw, average), tmp_path / "x.pt")
    out = tmp_path / "out"
    assert tokenloom.main(["convert", "taming", str(tmp_path / "x.pt"), str(out), "--weight-set", wanted]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"--weight-set {wanted}: {tmp_path / 'x.pt'} holds" in said
    assert words in said
    assert not out.exists()


def test_an_average_without_names_is_noted(tmp_path, raw):
    torch.save({"state_dict": raw, "ema": {"decay": 0.9, "shadow_params": list(raw.values())}}, tmp_path / "x.pt")
    assert taken(tmp_path / "x.pt") == ("raw", (
        "x.pt: took the raw weights `state_dict`; also there: `ema.shadow_params`, an average without names, "
        "which is not converted",))


def test_an_average_whose_names_are_lost_is_refused(tmp_path, raw):
    torch.save({"model_ema": dotless(raw)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds an average alone, whose names have lost their dots"):
        convert("taming", tmp_path / "x.pt")
    both = {"a.b": torch.zeros(1), "ab": torch.zeros(1)}
    torch.save({"state_dict": {**raw, **both, **below("model_ema.", dotless({**raw, **both}))}}, tmp_path / "y.pt")
    with pytest.raises(UserError, match="two tensors have one name in its average model_ema"):
        convert("taming", tmp_path / "y.pt")


# ---- never two sets in one model

def test_an_average_that_lacks_a_learned_tensor_is_not_filled_up(tmp_path, raw, average):
    for name in ("decoder.conv_out.bias", "quant_conv.weight"):
        cut = {key: tensor for key, tensor in average.items() if key != name}
        for payload in ({"model": raw, "ema": cut}, {"state_dict": {**raw, **below("model_ema.", dotless(cut))}}):
            torch.save(payload, tmp_path / "x.pt")
            with pytest.raises(UserError, match=f"1 missing \\({name}\\)"):
                convert("taming", tmp_path / "x.pt")


def test_a_codebook_that_is_no_parameter_comes_from_the_raw_weights_and_is_said(tmp_path, raw, average):
    """By moving average, it stands in no average of the parameters."""
    book = {"quantize.embedding.cluster_size": torch.rand(16), "quantize.embedding.embed_avg": torch.randn(16, 4)}
    learned = {name: tensor for name, tensor in average.items() if not name.startswith("quantize.")}
    torch.save({"state_dict": {**raw, **book, **below("model_ema.", dotless(learned))}}, tmp_path / "x.ckpt")
    part = convert("taming", tmp_path / "x.ckpt", ConvertOptions(resolution=SIDE))
    assert torch.equal(part.weights["quantize.embedding.weight"], raw["quantize.embedding.weight"])
    assert torch.equal(part.weights["decoder.conv_in.weight"], average["decoder.conv_in.weight"])
    assert part.notes[1] == ("x.ckpt: the average lacks quantize.embedding.weight, quantize.embedding.cluster_size, "
                             "quantize.embedding.embed_avg; they are taken from the raw weights")


# ---- which one a project's own code samples with

def test_a_first_stage_keeps_the_weights_that_the_second_stage_was_trained_on(tmp_path, raw, average):
    state = {**below("first_stage_model.", raw), **below("first_stage_model.model_ema.", dotless(average)),
             "transformer.head.weight": torch.zeros(3, 3)}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    found, notes = taken(tmp_path / "x.ckpt")
    assert found == "raw"
    assert "`state_dict.first_stage_model.model_ema` (--weight-set ema)" in notes[0]
    assert taken(tmp_path / "x.ckpt", weight_set="ema")[0] == "average"


def test_llamagens_transformers_are_sampled_with_their_raw_weights(tmp_path):
    states = [llamagen_reference.make_state(CLASSES, seed) for seed in (1, 2)]
    torch.save({"model": states[0], "ema": states[1]}, tmp_path / "c2i.pt")
    (tmp_path / "heads.yaml").write_text(f"n_head: {CLASSES.heads}\n")
    for wanted, expected in ((None, states[0]), ("ema", states[1]), ("raw", states[0])):
        part = convert("llamagen-gpt", tmp_path / "c2i.pt",
                       ConvertOptions(tmp_path / "heads.yaml", resolution=64, weight_set=wanted))
        assert all(torch.equal(part.weights[name], tensor) for name, tensor in expected.items())
        assert "c2i.pt: took the" in part.notes[0]


def test_the_other_kinds_take_the_option_too(tmp_path):
    states = [make_state(LLAMAGEN, seed) for seed in (1, 2)]
    torch.save({"model": states[0], "ema": states[1]}, tmp_path / "vq.pt")
    whole = {**below("gen_vision_model.", states[0]), **below("ema.gen_vision_model.", states[1])}
    torch.save({**whole, "language_model.model.layers.0.norm.weight": torch.zeros(2)}, tmp_path / "janus.bin")
    for kind, name in (("llamagen-vq", "vq.pt"), ("janus-vq", "janus.bin")):
        for wanted, expected in ((None, states[1]), ("raw", states[0]), ("ema", states[1])):
            model = from_checkpoint(kind, tmp_path / name, resolution=SIDE, weight_set=wanted)
            assert torch.equal(model.state_dict()["quant_conv.bias"], expected["quant_conv.bias"])


def test_diffusers_keeps_the_raw_weights_in_a_file_of_their_own(tmp_path):
    tiny.vqgan().save_pretrained(tmp_path / "ours")
    folder = export_checkpoint("diffusers-vq", tmp_path / "ours", tmp_path / "vqvae")
    name = "diffusion_pytorch_model"
    averages = load_file(folder / f"{name}.safetensors")
    save_file({key: tensor * 3 for key, tensor in averages.items()}, folder / f"{name}.non_ema.safetensors")
    notes = {"raw": f"took the raw weights `{name}.non_ema.safetensors`; also there: `{name}.safetensors` (--weight-set ema)",
             "ema": f"took the average `{name}.safetensors`; also there: `{name}.non_ema.safetensors` (--weight-set raw)"}
    for wanted, factor in ((None, 1), ("ema", 1), ("raw", 3)):
        part = convert("diffusers-vq", folder, ConvertOptions(resolution=16, weight_set=wanted))
        assert torch.equal(part.weights["quant_conv.bias"], averages["quant_conv.bias"] * factor)
        assert part.notes == (notes[wanted or "ema"],)
    with pytest.raises(UserError, match=r"--weight-set model: .* holds ema and raw; give one of them"):
        convert("diffusers-vq", folder, ConvertOptions(weight_set="model"))
    (folder / f"{name}.safetensors").unlink()
    assert convert("diffusers-vq", folder, ConvertOptions(resolution=16)).notes == ()
    with pytest.raises(UserError, match="holds one set of weights only, the top level; leave --weight-set out"):
        convert("diffusers-vq", folder, ConvertOptions(weight_set="ema"))


def test_a_run_folder_says_that_an_average_is_beside_it(tmp_path, raw, average):
    for name, state in (("last", raw), ("last-EMA", average)):
        torch.save({"state_dict": state}, tmp_path / f"{name}.ckpt")
    assert taken(tmp_path) == ("raw", ("took last.ckpt; also there: last-EMA.ckpt, an average by its name "
                                       "(give the file itself)",))


def test_a_file_of_flax_takes_no_such_option(tmp_path, capsys):
    (tmp_path / "flax_model.msgpack").write_bytes(b"")
    argv = ["convert", "vqgan-jax", str(tmp_path), str(tmp_path / "out"), "--weight-set", "ema"]
    assert tokenloom.main(argv) == 2
    assert "--weight-set is not read when converting vqgan-jax" in capsys.readouterr().err


def test_the_note_stands_in_the_model_card(tmp_path, capsys, raw, average):
    torch.save({"model": raw, "ema": average}, tmp_path / "x.pt")
    argv = ["convert", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--weight-set", "raw"]
    assert tokenloom.main(argv) == 0
    line = "x.pt: took the raw weights `model`; also there: `ema` (--weight-set ema)"
    assert f"note: {line}\n" in capsys.readouterr().err
    assert f"- {line}\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_caller_in_python_is_told_too(tmp_path, caplog, raw, average):
    torch.save({"model": raw, "ema": average}, tmp_path / "x.pt")
    from_checkpoint("taming", tmp_path / "x.pt", resolution=SIDE)
    assert "took the average `ema`; also there: `model`" in caplog.text


def test_a_mapping_that_holds_itself_is_walked_once(tmp_path, raw):
    payload: dict = {"model": raw}
    for number in range(50):
        payload[f"again{number}"] = payload
    torch.save(payload, tmp_path / "x.pt")
    assert taken(tmp_path / "x.pt") == ("raw", ())
