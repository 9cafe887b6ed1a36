"""The compiled step of the CPU: its products, its independence of neighbours and threads, and when it is used.

That it computes what the training graph computes is in test_decoder.py, for every shape.
"""

from __future__ import annotations

import dataclasses
import math

import numba
import numpy as np
import pytest
import torch

from inference.decoder import calibration
from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.native import basics, threads
from inference.decoder.native.basics import error_function, exponential, version
from inference.decoder.native.trial import products
from inference.decoder.projection import MatmulStrategy
from inference.decoder.timing import Budget
from inference.generation.ways import generate_tokens
from tests.decoder_shapes import SHAPES, STRATEGIES, build, cached_with, prefilled, tokens
from tests.test_jacobi import PARAMS, request

SIZES = [(1, 1), (4, 16), (7, 13), (9, 33), (33, 70), (16, 1365)]  # outputs, inputs


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.long
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 13])
def test_products_equal_matrix_products_and_rows_do_not_depend_on_each_other(rows, outputs, inputs, two_threads):
    generator = torch.Generator().manual_seed(rows)
    matrix, x = torch.randn(outputs, inputs, generator=generator), torch.randn(rows, inputs, generator=generator)
    found = products([matrix], x)().clone()
    assert (found - x.double() @ matrix.double().t()).abs().max() < 1e-5 * inputs**0.5
    for row in range(rows):
        assert torch.equal(products([matrix], x[row: row + 1].clone())()[0], found[row])


@pytest.mark.long
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_products_of_bytes_are_exact(rows, outputs, inputs, two_threads):
    generator = torch.Generator().manual_seed(rows)
    matrix = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    x = torch.randint(-127, 128, (rows, inputs), dtype=torch.int16, generator=generator)
    matrix[0], x[0] = 127, -127  # the largest sum
    assert torch.equal(products([matrix], x)().long(), x.long() @ matrix.long().t())


def test_functions_of_one_number_are_those_of_torch():
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-2, 2, 4001)])
    found = torch.tensor([exponential(value) for value in x.numpy()], dtype=torch.float64)
    assert (found / x.double().clamp(-87, 88).exp() - 1).abs().max() < 1e-6
    found = torch.tensor([error_function(value) for value in x.numpy()], dtype=torch.float64)
    assert (found - x.double().erf()).abs().max() < 5e-7
    assert math.isnan(exponential(np.float32("nan")))
    assert math.isnan(error_function(np.float32("nan")))


def test_all_of_several_matrices_are_multiplied(two_threads):
    matrices = [torch.randn(8, 5), torch.randn(8, 5)]
    x = torch.randn(2, 5)
    assert torch.allclose(products(matrices, x)(), x @ matrices[1].t(), atol=1e-5)


@pytest.mark.parametrize("shape", ["encoder-decoder default", "encoder-decoder normformer", "decoder-only dalle",
                                   "decoder-only sandwich"])
@pytest.mark.parametrize("int8", [False, True])
def test_a_row_is_the_same_to_the_last_bit_whatever_shares_the_batch_and_however_many_threads(shape, int8, two_threads):
    model, text, layout = build(shape)
    decoder = CachedDecoder(model, int8=int8, matmul=STRATEGIES["native"])
    image_tokens = tokens(model, 4)
    together = cached_with(decoder, text, image_tokens, layout)
    for row in range(4):
        memory = [decoder.prefill(text, 1)]
        cache = decoder.new_cache(memory)
        first = decoder.first_position
        previous = torch.full((4, 1), decoder.begin) if first == 0 else image_tokens[:, :1]
        four = decoder.decode_at(previous, torch.full((4, 1), first), memory, cache)
        assert torch.equal(four[row, 0], together[row, first])
    for count in (1, 3):
        torch.set_num_threads(count)
        assert torch.equal(cached_with(decoder, text, image_tokens, layout), together)


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bit_steps_equal_those_of_torch(shape):
    model, text, layout = build(shape)
    image_tokens = tokens(model, 4)
    plain = CachedDecoder(model, int8=True)
    expected = cached_with(plain, text, image_tokens, layout)
    model, text, layout = build(shape)
    found = cached_with(CachedDecoder(model, int8=True, matmul=STRATEGIES["native"]), text, image_tokens, layout)
    # sums of norms differ in the last bit, so that here and there an input is rounded to its other neighbour
    assert (found - expected).abs().mean() < 2e-3 * expected.std()
    assert (found - expected).abs().median() < 1e-4


@pytest.mark.parametrize("shape", ["encoder-decoder default", "decoder-only dalle", "encoder-decoder layout"])
@pytest.mark.parametrize("window", [1, 4])
def test_tokens_equal_those_of_torch(shape, window):
    decoder, asked = request(shape, PARAMS["ends-early"], window)
    expected = generate_tokens(decoder, dataclasses.replace(asked, window=1))[0]
    native = CachedDecoder(build(shape)[0], matmul=STRATEGIES["native"])
    assert torch.equal(generate_tokens(native, asked)[0], expected)


@pytest.mark.parametrize("int8", [False, True])
def test_a_broken_row_leaves_the_others_alone_and_is_seen_to_be_broken(int8):
    model, text, _ = build("encoder-decoder default")
    decoder = CachedDecoder(model, int8=int8, matmul=STRATEGIES["native"])
    image_tokens = tokens(model, 4)
    expected = cached_with(decoder, text, image_tokens)
    groups, cache = prefilled(decoder, text, None)
    with torch.inference_mode():
        groups[0].keys[0][1] = torch.nan
    for at in range(4):
        logits = decoder.decode_one(None if at == 0 else image_tokens[:, at - 1], at, groups, cache)
        assert torch.equal(logits[[0, 2, 3]], expected[[0, 2, 3], at])
        assert logits[1].isnan().all()


def test_more_rows_than_measured_fast_are_worked_through_by_torch(monkeypatch):
    model, text, _ = build("encoder-decoder default")
    decoder = CachedDecoder(model, matmul=MatmulStrategy(native_to=3))
    used = []
    real = decoder._native
    monkeypatch.setattr(decoder, "_native", lambda hidden, *rest: used.append(len(hidden)) or real(hidden, *rest))
    for count in (3, 4):
        part = type(text)(*(part[:count] for part in text))
        cached_with(decoder, part, tokens(model, count)[:, :2])
    assert used == [3, 3]


def test_without_pytorchs_own_threads_it_is_not_chosen(monkeypatch):
    monkeypatch.setattr(threads.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    real = threads.library.__wrapped__
    assert real() is None
    monkeypatch.setattr(threads, "library", lambda: None)
    measured = calibration._native_strategy([torch.randn(8, 8)], False, torch.Generator(), Budget(None))
    assert measured.strategy == MatmulStrategy()
    monkeypatch.setattr(torch.__config__, "parallel_info", lambda: "native thread pool")
    assert real() is None


def test_a_folder_that_cannot_be_written_to_costs_time_alone(monkeypatch):
    asked = []

    def cfunc(signature, cache=False, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(threads, "cfunc", cfunc)
    assert threads.compiled(len) is len
    assert asked == [True, False]


def test_compiled_code_is_kept_by_all_of_its_sources(monkeypatch, tmp_path):
    (tmp_path / "a.py").write_text("one")
    monkeypatch.setattr(basics, "__file__", str(tmp_path / "kernels.py"))
    first = version.__wrapped__()
    (tmp_path / "a.py").write_text("two")
    assert version.__wrapped__() != first


@pytest.mark.long
def test_compiling_is_said_and_reading_the_disk_is_not(monkeypatch, tmp_path, caplog):
    def made(note: str):
        def first_share(pointer):
            basics.thread_share(pointer[0], 4, 0, 2)
            basics.maximum(basics.float32_at(pointer[1], 4), 4)

        return threads.compiled(first_share, note)

    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path))
    made("compiling")
    assert [record.message for record in caplog.records] == ["compiling"]
    made("compiling")
    made("")
    assert len(caplog.records) == 1


def test_where_compiled_code_cannot_be_kept_it_is_said(monkeypatch, caplog):
    def refuse(signature, cache=False, **options):
        if cache:
            raise RuntimeError("no locator available")
        return lambda function: "code"

    monkeypatch.setattr(threads, "cfunc", refuse)
    assert threads.compiled(lambda pointer: None, "compiling") == "code"
    (record,) = caplog.records
    assert "set NUMBA_CACHE_DIR" in record.message
