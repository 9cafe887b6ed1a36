"""Loading a model folder: mapped, not copied; the same numbers; every kind of damage one line."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import nn

from tests import tiny
from tokenizer_image import IMAGE_TOKENIZERS, PRESETS, build_tokenizer
from tokenloom_common import weights
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import MissingFileError, UserError
from tokenloom_common.pretrained import (
    INDEX_NAME,
    WEIGHTS_NAME,
    PretrainedModule,
    SkipParameterInit,
    has_unsaved_tensors,
)
from tokenloom_common.tensor_writer import ALIGNMENT, write_tensors
from tokenloom_common.weights import read_tensors


class ToyConfig(StrictConfig):
    width: int = Field(16, ge=1)
    extra: bool = False


class Toy(PretrainedModule):
    """A frozen parameter, a counter, and with `extra` a buffer that no file has."""

    kind: ClassVar[str] = "toy"
    config_class: ClassVar[type[StrictConfig]] = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.width, 5)
        self.frozen = nn.Parameter(torch.ones(config.width), requires_grad=False)
        self.count: torch.Tensor
        self.register_buffer("count", torch.tensor(3))
        if config.extra:
            self.register_buffer("positions", torch.arange(config.width), persistent=False)


@pytest.fixture
def toy(tmp_path) -> Path:
    torch.manual_seed(0)
    return Toy(ToyConfig()).save_pretrained(tmp_path / "toy")


MODELS = {"encoder-decoder": tiny.seq2seq, "decoder-only": tiny.decoder_only, "matcher": tiny.matcher,
          "dvae": lambda: build_tokenizer(PRESETS["dvae-debug"][1]), "vqgan": tiny.vqgan,
          "vit_vqgan": lambda: build_tokenizer(PRESETS["vit-debug"][1])}
BUILT_IN_EARNEST = {"vqgan", "vit_vqgan"}
"""Whose quantizer keeps a zero, or whose transformer keeps positions, that no file has."""


def test_every_kind_of_image_tokenizer_is_among_the_models():
    assert set(IMAGE_TOKENIZERS) <= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_has_every_number_of_the_saved_one(name, tmp_path):
    model = MODELS[name]()
    loaded = type(model).from_pretrained(model.save_pretrained(tmp_path / "model"))
    assert not loaded.training
    for before, after in ((model.named_parameters(), dict(loaded.named_parameters())),
                          (model.named_buffers(), dict(loaded.named_buffers()))):
        for where, tensor in before:
            assert torch.equal(tensor, after[where]) and tensor.dtype == after[where].dtype, where
            assert after[where].data_ptr() % ALIGNMENT == 0, where
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in loaded.parameters()]
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert has_unsaved_tensors(empty) == (name in BUILT_IN_EARNEST)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_parameters_are_the_files_own_pages(tmp_path):
    folder = tiny.seq2seq().save_pretrained(tmp_path / "model")
    loaded = type(tiny.seq2seq()).from_pretrained(folder)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    mapped = {name for name, one in loaded.named_parameters() if any(start <= one.data_ptr() < end for start, end in spans)}
    assert {name for name, one in loaded.named_parameters() if one.nbytes % ALIGNMENT == 0} <= mapped  # the others lie last
    assert len(mapped) > 60
    assert all(line[1].endswith("p") for line in lines)  # private


def test_training_a_loaded_model_leaves_its_file_alone(tmp_path):
    model = tiny.seq2seq()
    folder = model.save_pretrained(tmp_path / "model")
    before = (folder / WEIGHTS_NAME).read_bytes()
    loaded = type(model).from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.1)
    text = torch.randint(1, 300, (2, tiny.TEXT_LENGTH))
    loaded(text, torch.ones_like(text, dtype=torch.bool), torch.randint(0, 32, (2, 16))).image.square().mean().backward()
    optimizer.step()
    assert not torch.equal(loaded.to_logits.weight, model.to_logits.weight)
    assert (folder / WEIGHTS_NAME).read_bytes() == before
    assert torch.equal(type(model).from_pretrained(folder).to_logits.weight, model.to_logits.weight)


def test_a_model_keeps_its_numbers_when_its_folder_is_replaced(tmp_path):
    first, second = tiny.seq2seq(seed=0), tiny.seq2seq(seed=1)
    loaded = type(first).from_pretrained(first.save_pretrained(tmp_path / "model"))
    second.save_pretrained(tmp_path / "model")
    assert torch.equal(loaded.to_logits.weight, first.to_logits.weight)
    loaded.save_pretrained(tmp_path / "model")  # over the very folder that is mapped
    assert torch.equal(type(first).from_pretrained(tmp_path / "model").to_logits.weight, first.to_logits.weight)


def test_numbers_of_another_type_become_the_models_own(toy):
    state = load_file(toy / WEIGHTS_NAME)
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor.int() for name, tensor in state.items()}
    save_file(halves, toy / WEIGHTS_NAME)
    loaded = Toy.from_pretrained(toy)
    assert loaded.linear.weight.dtype == torch.float32 and loaded.count.dtype == torch.int64
    assert torch.equal(loaded.linear.weight, state["linear.weight"].half().float())
    assert loaded.linear.weight.requires_grad and not loaded.frozen.requires_grad


def test_a_buffer_that_no_file_has_is_computed(tmp_path):
    folder = Toy(ToyConfig(extra=True)).save_pretrained(tmp_path / "toy")
    assert torch.equal(Toy.from_pretrained(folder).positions, torch.arange(16))


@pytest.mark.parametrize("name", MODELS)
def test_no_parameter_is_drawn_for_a_model_that_a_file_fills(name):
    config, kind = (model := MODELS[name]()).config, type(model)
    torch.manual_seed(0)
    with SkipParameterInit():
        kind(config)
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    buffers = sum(buffer.numel() for buffer in model.buffers())
    if not buffers:
        assert torch.equal(drawn, torch.get_rng_state())
    kind(config)
    assert not torch.equal(drawn, torch.get_rng_state())


def test_what_is_frozen_while_building_stays_frozen():
    with SkipParameterInit():
        assert not nn.Parameter(torch.ones(2)).requires_grad_(False).requires_grad
        assert nn.init.ones_(nn.Parameter(torch.zeros(2))).tolist() == [1, 1]  # what is not drawn is set


def test_files_of_other_writers_give_tensors_at_the_usual_addresses(toy):
    state = load_file(toy / WEIGHTS_NAME)
    save_file(state, toy / WEIGHTS_NAME, metadata={"a": "b" * 3})
    found = read_tensors(toy)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in found.values())


def test_odd_tensors_come_last_so_that_the_others_are_where_they_can_be_mapped(tmp_path):
    sizes = {"a": (), "b": (16,), "c": (3,), "d": (4, 8), "e": (0,)}
    tensors = {name: torch.randn(size) for name, size in sizes.items()} | {
        "half": torch.ones(32, dtype=torch.bfloat16), "flag": torch.tensor([True]), "view": torch.randn(8, 6)[:, 2:4]}
    write_tensors(tmp_path / WEIGHTS_NAME, tensors, lambda name: tensors[name])
    raw = (tmp_path / WEIGHTS_NAME).read_bytes()
    header = json.loads(raw[8: 8 + int.from_bytes(raw[:8], "little")])
    start = 8 + int.from_bytes(raw[:8], "little")
    aligned = {name for name, entry in header.items() if "shape" in entry and not (start + entry["data_offsets"][0]) % 64}
    assert {"b", "d", "e", "half", "view"} <= aligned
    found = load_file(tmp_path / WEIGHTS_NAME)  # the library reads what we write
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())


@pytest.fixture
def sharded(tmp_path) -> Path:
    torch.manual_seed(0)
    return Toy(ToyConfig(width=64)).save_pretrained(tmp_path / "sharded", max_shard_size="1KB")


def test_each_shard_is_opened_once(sharded, monkeypatch):
    opened = []
    real = weights.safe_open
    monkeypatch.setattr(weights, "safe_open", lambda path, **options: opened.append(path.name) or real(path, **options))
    loaded = Toy.from_pretrained(sharded)
    assert loaded.linear.weight.shape == (5, 64)
    assert sorted(opened) == sorted(path.name for path in sharded.glob("*.safetensors")) and len(opened) > 1


def change_index(folder: Path, change) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def copy_tensor(folder: Path) -> None:
    """The first shard's tensor into the second shard too."""
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)


@pytest.mark.parametrize(("damage", "error", "words"), [
    (lambda f: change_index(f, lambda m: m.update(absent=m["count"])), UserError, "names 'absent' in model-.*which lacks it"),
    (lambda f: change_index(f, lambda m: m.update(count=m["linear.weight"])), UserError, "names 'count' in .*which lacks it"),
    (lambda f: change_index(f, lambda m: m.pop("count")), UserError, "does not name 'count' in|1 missing"),
    (copy_tensor, UserError, "does not name '.*' in model-00002.*, which holds it"),
    (lambda f: change_index(f, lambda m: m.update(count="model-9.safetensors")), MissingFileError, "weights are missing"),
    (lambda f: change_index(f, lambda m: m.update(count="../x.safetensors")), UserError, "names a file outside the folder"),
    (lambda f: change_index(f, lambda m: m.update(count=3)), UserError, r"names a file outside the folder \(3\)"),
    (lambda f: change_index(f, lambda m: m.clear()), UserError, "missing"),
    (lambda f: (f / INDEX_NAME).write_text("[" * 100_000), UserError, "not a safetensors index"),
    (lambda f: (f / INDEX_NAME).write_text('{"weight_map": []}'), UserError, "not a safetensors index"),
    (lambda f: save_file({"count": torch.zeros(1)}, f / WEIGHTS_NAME), UserError, "only one of them can be the model"),
    (lambda f: sorted(f.glob("*.safetensors"))[0].unlink(), MissingFileError, "weights are missing"),
])
def test_a_damaged_index_is_one_line(sharded, damage, error, words):
    damage(sharded)
    with pytest.raises(error, match=words) as caught:
        Toy.from_pretrained(sharded)
    assert str(sharded) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def with_header(path: Path, change) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8: 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length:])


def entry(**values):
    return lambda path: with_header(path, lambda header: header["frozen"].update(values))


@pytest.mark.parametrize("damage", [
    lambda p: p.write_bytes(p.read_bytes()[:-1]),
    lambda p: p.write_bytes(p.read_bytes() + b"more"),
    lambda p: p.write_bytes(p.read_bytes()[:7]),
    lambda p: p.write_bytes(struct.pack("<Q", 1 << 62) + p.read_bytes()[8:]),
    lambda p: p.write_bytes(struct.pack("<Q", 99_999_999) + p.read_bytes()[8:]),
    lambda p: p.write_bytes(struct.pack("<Q", 0) + p.read_bytes()[8:]),
    lambda p: p.write_bytes(p.read_bytes()[:8] + b"\xff" + p.read_bytes()[9:]),
    entry(data_offsets=[0, 1 << 50]), entry(data_offsets=[64, 0]), entry(data_offsets=[-1, 63]), entry(data_offsets=[64, 128]),
    lambda p: with_header(p, lambda header: header.update(a={"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]})),
    entry(shape=[1 << 40]), entry(shape=[1 << 32, 1 << 32]), entry(shape=[-16]), entry(dtype="F9"), entry(dtype="F64"),
    lambda p: with_header(p, lambda header: header.clear()),
])
def test_a_file_that_lies_is_one_line(toy, damage):
    damage(toy / WEIGHTS_NAME)
    with pytest.raises(UserError, match="not a whole safetensors file") as caught:
        Toy.from_pretrained(toy)
    assert str(toy) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(("values", "words"), [
    ({"frozen": {"shape": [4, 4]}}, r"1 mis-shaped \(frozen \[4, 4\] instead of \[16\]\)"),
    ({"frozen": {"shape": [16] + [1] * 5000}}, r"1 mis-shaped \(frozen \[16, 1, 1[^]]{,80} instead of \[16\]\)"),
    ({"frozen": {"dtype": "I32"}}, "frozen holds int32, the model float32"),
    ({"linear.bias": {"dtype": "U32"}}, "linear.bias holds uint32, the model float32"),
    ({"count": {"dtype": "F64"}}, "count holds float64, the model int64"),
])
def test_shapes_and_types_are_compared_with_the_config(toy, values, words):
    with_header(toy / WEIGHTS_NAME, lambda header: [header[name].update(one) for name, one in values.items()])
    with pytest.raises(UserError, match=words):
        Toy.from_pretrained(toy)
