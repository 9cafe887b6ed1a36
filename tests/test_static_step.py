"""The step that CUDA captures as a graph, run here without one: the same tokens, from buffers that are used again."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch

from inference.generation.batch import Generation
from inference.generation.cuda_graph import MAX_STEPS_KEPT, StaticStep, padded, static_steps
from tests.decoder_shapes import SHAPES
from tests.test_jacobi import PARAMS, request


def drawn(decoder, asked) -> torch.Tensor:
    return torch.stack(list(static_steps(Generation(decoder, asked))), dim=1)


def plainly(decoder, asked) -> torch.Tensor:
    return torch.stack(list(Generation(decoder, asked).steps()), dim=1)


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("images", [1, 3])
def test_tokens_equal_plain_decoding(params, images):
    decoder, asked = request("encoder-decoder default", PARAMS[params], images=images)
    assert torch.equal(drawn(decoder, asked), plainly(decoder, asked))


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_plain_decoding_in_every_family(shape):
    decoder, asked = request(shape, PARAMS["ends-early"])
    assert torch.equal(drawn(decoder, asked), plainly(decoder, asked))


def test_another_request_of_the_size_uses_the_same_buffers_and_gets_its_own_tokens():
    decoder, asked = request("encoder-decoder default", PARAMS["guided"], images=3)  # 6 pictures, padded to 8
    first = drawn(decoder, asked)
    made = len(decoder.recorded_steps)
    other = dataclasses.replace(asked, seeds=[seed + 50 for seed in asked.seeds[:5]],
                                captions=asked.unconditional, images=5)
    second = drawn(decoder, other)
    assert len(decoder.recorded_steps) == made
    assert torch.equal(second, plainly(decoder, other))
    assert torch.equal(drawn(decoder, asked), first)
    assert not torch.equal(first[:5], second)


def test_few_steps_are_kept():
    decoder, asked = request("encoder-decoder default", PARAMS["plain"])
    for k in range(1, MAX_STEPS_KEPT + 3):
        drawn(decoder, dataclasses.replace(asked, params=asked.params.model_copy(update={"top_k": k})))
    assert len(decoder.recorded_steps) == MAX_STEPS_KEPT


def test_the_step_asks_nothing_of_its_tensors():
    """What a CUDA graph cannot hold: a value read by Python. Meta tensors have none, so reading one raises."""
    decoder, asked = request("decoder-only dalle", PARAMS["guided"])
    step = StaticStep(decoder, 4, 2, asked.params)
    before = [buffer.data_ptr() for buffer in (step.cache.keys, step.tokens, step.previous, step.positions)]
    step.positions.fill_(1)
    step()
    assert [buffer.data_ptr() for buffer in (step.cache.keys, step.tokens, step.previous, step.positions)] == before
    assert step.positions.unique().tolist() == [2]
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda: step._step())()  # traces tensor operations alone
    assert not any("_local_scalar_dense" in str(node.target) for node in graph.graph.nodes)


def test_batches_are_padded_to_few_sizes():
    assert [padded(count) for count in (1, 2, 3, 5, 8, 9, 16, 17, 33)] == [1, 2, 4, 8, 8, 16, 16, 24, 40]


@pytest.mark.long
def test_recorded_steps_end_with_their_decoder():
    decoder, asked = request("encoder-decoder default", PARAMS["guided"])
    drawn(decoder, asked)
    assert len(decoder.recorded_steps) == 1
    gone = weakref.ref(decoder)
    del decoder
    gc.collect()
    assert gone() is None
