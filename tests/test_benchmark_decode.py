"""benchmarks/decode/run.py on tiny sizes: what is timed, that it is refused where it differs, and what is written."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import harness
from benchmarks.decode import chart as decode_chart
from benchmarks.decode import run as decode
from benchmarks.decode import subject as decode_subject
from benchmarks.decode.document import fastest_variant
from benchmarks.decode.engines import Mode, OurEngine, our_case
from benchmarks.decode.limits import Limits, StepCost, measure_limits, step_cost
from benchmarks.decode.options import DEFAULT_PEERS, GUIDANCE
from benchmarks.decode.reference import make_model, make_work
from benchmarks.decode.run import Bench
from inference.decoder.cached_decoder import CachedDecoder
from tests import tiny
from tests.test_benchmarks import last_line, threads_as_before  # noqa: F401
from tokenloom_common.errors import UserError

TINY = decode_subject.REFERENCE | {"text_vocab_size": 40, "text_length": 6, "codebook_size": 32, "grid": (4, 4), "width": 32,
                                   "heads": 2, "head_dim": 16, "encoder_layers": 1, "decoder_layers": 2}
FEW = ["decode", "--batch", "1,2", "--repeats", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def tiny_reference(monkeypatch):
    monkeypatch.setattr(decode_subject, "REFERENCE", TINY)
    monkeypatch.setattr(decode_subject, "QUICK", TINY)
    monkeypatch.setattr(decode, "measure_limits", lambda device, dtype: Limits(1e9, 1e10))


@pytest.fixture
def here(monkeypatch):
    """Memory cases run in this process and need 3 MiB."""
    def peak(build, arguments, device, threads):
        harness.build_case(build, json.loads(json.dumps(arguments)))()
        return 3.0

    monkeypatch.setattr(harness, "peak_memory", peak)


@pytest.mark.long
def test_the_document_has_every_engine_batch_and_guidance(here, capsys):
    assert command.main([*FEW, "--peers", "x-transformers,x-transformers, no cache", "--jacobi", "4"]) == 0
    document = last_line(capsys)
    names = {"ours", "ours int8", "ours jacobi 4", "x-transformers"}
    found = {(row["engine"], row["batch"], row["guidance"]) for row in document["results"]}
    assert found == {(name, batch, guidance) for name in names for batch in (1, 2) for guidance in (1.0, 3.0)} \
        | {("x-transformers, no cache", 1, guidance) for guidance in (1.0, 3.0)}
    assert [row["rows"] for row in document["results"] if row["engine"] == "ours"] == [1, 2, 2, 4]
    assert len(document["ratio_vs_xtransformers"]) == 12
    assert document["ratio_vs_xtransformers"]["ours, batch 2, guidance on"] > 0
    assert document["ratio_vs_transformers"] == document["ratio_vs_min_dalle"] == {}
    assert set(document["fraction_of_limit"]) == {
        f"{name}, batch {batch}, guidance {guidance}" for name in ("ours", "ours int8") for batch in (1, 2)
        for guidance in ("on", "off")}
    assert all(row["tokens_per_step"] >= 1 for row in document["results"] if row["engine"] == "ours jacobi 4")
    assert [row["engine"] for row in document["verification"]] == ["ours", "ours", "ours int8", "ours int8", "x-transformers",
                                                                   "x-transformers, no cache"]
    assert [row["measured_mib"] for row in document["memory"]] == [3.0, 3.0]
    assert document["peers"]["x-transformers"]["version"]
    assert document["environment"]["torch"] == torch.__version__


def test_the_json_goes_to_a_file_too(here, capsys, tmp_path):
    path = tmp_path / "decode.json"
    assert command.main([*FEW, "--batch", "1", "--guidance", "off", "--peers", "none", "--no-int8", "--tokens", "3", "--json",
                         str(path)]) == 0
    document = json.loads(path.read_text())
    assert document == last_line(capsys)
    assert [(row["engine"], row["tokens"]) for row in document["results"]] == [("ours", 3)]


def test_an_engine_that_draws_something_else_is_not_timed(monkeypatch, capsys):
    real = CachedDecoder.decode_one
    monkeypatch.setattr(CachedDecoder, "decode_one", lambda self, *inputs: real(self, *inputs) * 1.01)
    monkeypatch.setattr(decode, "speed", lambda *_: pytest.fail("timed"))
    assert command.main([*FEW, "--peers", "none", "--no-int8"]) == 1
    captured = capsys.readouterr()
    assert "ours does not do the same work, so nothing was timed" in captured.err.splitlines()[-1]
    assert json.loads(captured.out.splitlines()[-1])["results"] == []


def test_a_peer_that_is_missing_is_named_and_left_out(here, monkeypatch, capsys):
    monkeypatch.setattr(decode, "missing", lambda name: f"pip install tokenloom[bench] ({name})")
    assert command.main([*FEW, "--batch", "1", "--guidance", "off", "--no-int8"]) == 0
    captured = capsys.readouterr()
    assert "not measured: transformers (pip install tokenloom[bench] (transformers))" in captured.out
    assert set(json.loads(captured.out.splitlines()[-1])["peers"]) == set(DEFAULT_PEERS)


def test_ratios_are_against_the_fastest_variant_of_a_peer():
    timed = {name: harness.Timing(seconds) for name, seconds in {
        "ours": [1.0, 1.0], "transformers": [4.0, 6.0], "transformers, static cache": [3.0, 3.0], "x-transformers": [2.0] * 2,
        "x-transformers, no cache": [9.0] * 2}.items()}
    assert fastest_variant(timed, "transformers") == "transformers, static cache"
    assert fastest_variant(timed, "x-transformers") == "x-transformers"
    assert fastest_variant(timed, "min-dalle") is None


def test_a_steps_least_cost_by_hand():
    model = make_model(TINY, "cpu", "float32")
    cost = step_cost(CachedDecoder(model), rows=2, tokens=5, text_slots=4)
    inner = int(32 * 8 / 3)
    layer = 32 * 96 + 32 * 32 + 2 * 32 * 32 + 2 * inner * 32 + inner * 32  # qkv, out; query and out across; up, down
    matrices = 2 * layer + 32 * 32
    slots = 3 + 4  # of 1 .. 5 tokens on average 3, and the caption's
    assert cost.bytes == 4 * (matrices + 2 * slots * 2 * 2 * 32)
    assert cost.flops == 2 * (2 * matrices + 4 * 2 * 32 * slots)
    assert StepCost(10.0, 4.0).seconds(Limits(5.0, 1.0)) == 4.0
    assert StepCost(10.0, 4.0).seconds(Limits(2.0, 4.0)) == 5.0


def test_eight_bit_matrices_cost_a_quarter_and_their_scales():
    whole, rounded = (step_cost(CachedDecoder(make_model(TINY, "cpu", "float32"), int8=int8), 1, 1, 0)
                      for int8 in (False, True))
    assert 0.25 < rounded.bytes / whole.bytes < 0.33
    assert rounded.flops == whole.flops


@pytest.mark.long
def test_limits_are_rates_of_this_machine():
    limits = measure_limits("cpu", "float32")
    assert 1e8 < limits.bytes_per_s < 1e13
    assert 1e8 < limits.flops_per_s < 1e14


def test_our_engine_counts_its_steps_and_draws_the_same_in_every_window():
    model = make_model(TINY, "cpu", "float32")
    engine, work = OurEngine(model), make_work(model, 2, 1, 16, 3.0)
    plain = engine.sample(work)
    assert engine.forwards == 16
    assert torch.equal(engine.sample(work, window=5), plain)
    assert engine.forwards < 16
    assert our_case(2, 7, 3.0, TINY, "cpu", "float32")().shape == (2, 7)
    assert Mode(True, 8).name == "ours int8 jacobi 8"


@pytest.mark.long
def test_a_trained_folder_is_drawn_from_its_own_captions(tmp_path):
    folder = tiny.model_folder(tmp_path / "m")
    bench = Bench(decode.parse(["--model", str(folder), "--peers", "x-transformers", "--jacobi", "3", "--threads", "1"])[0])
    work = bench.work(3, GUIDANCE["on"][0])
    assert torch.equal(work.captions.text_input, tiny.text_tokenizer().encode(list(decode_subject.PROMPTS[:3])).text_input)
    assert bench.subject.facts()["trained"] is True
    assert "rotary 1d" in bench.peer_facts["x-transformers"]["weights"]  # the tiny model's is 2d
    assert bench.peers["x-transformers"].sample(work).shape == (6, 16)
    assert all(row["ok"] for row in decode.verification(bench))


@pytest.mark.parametrize(("options", "words"), [
    (["--model", "nowhere"], "--model nowhere: neither a model folder nor a preset"),
    (["--model", "parti-3"], "did you mean 'parti-3b'"), (["--model", "dalle"], "peers are encoder-decoders"),
    (["--batch", "0"], "--batch '0'"), (["--tokens", "17"], "--tokens 17: a picture of this model has 16"),
    (["--peers", "min-dale"], "unknown peer 'min-dale'; did you mean 'min-dalle'"), (["--jacobi", "1"], "--jacobi 1 is plain"),
    (["--repeats", "0"], "--repeats 0 must be at least 1"), (["--threads", "0"], "--threads 0"),
    (["--json", "/proc/x.json"], "/proc/x.json: cannot be written"),
    (["--device", "cuda"], "no usable GPU")])
def test_wrong_options_are_one_line(capsys, options, words):
    if options == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert command.main(["decode", *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "benchmarks decode: error" in line]
    assert len(lines) == 1
    assert words in lines[0]


def test_defaults_are_the_issues_batches_and_peers():
    options = decode.parse(["--threads", "1"])[0]
    assert options.batches == [1, 2, 4, 8, 16, 32]
    assert options.peers == list(DEFAULT_PEERS)
    assert decode.parse(["--model", "dalle-mini", "--threads", "1"])[0].peers == ["min-dalle"]
    with pytest.raises(UserError, match="expected whole numbers"):
        decode.parse(["--jacobi", "x"])


def document(rows) -> dict:
    keys = ("engine", "batch", "guidance", "ms_per_token")
    return {"results": [dict(zip(keys, row, strict=True)) for row in rows]}


@pytest.mark.long
def test_the_chart_takes_the_fastest_variant_and_shows_every_engine(tmp_path, capsys):
    rows = [("ours", 1, 1.0, 2.0), ("transformers", 1, 1.0, 5.0), ("transformers, static cache", 1, 1.0, 4.0),
            ("ours", 8, 3.0, 9.0), ("ours jacobi 8", 1, 1.0, 1.0)]
    assert decode_chart.rows_of([document(rows)]) == {
        (1.0, 1, "ours"): 2.0, (1.0, 1, "transformers"): 4.0, (3.0, 8, "ours"): 9.0}
    (tmp_path / "a.json").write_text(json.dumps(document(rows)))
    assert decode_chart.main([str(tmp_path / "a.json"), str(tmp_path / "c.png")]) == 0
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.size[0] > picture.size[1]


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "usage"), (["a.json", "b.json"], "usage"), (["nowhere.json", "c.png"], "cannot be read"),
    (["EMPTY", "c.png"], "hold no results")])
def test_a_wrong_chart_is_refused(tmp_path, arguments, words):
    (tmp_path / "e.json").write_text(json.dumps(document([])))
    with pytest.raises(UserError, match=words):
        decode_chart.main([str(tmp_path / "e.json") if name == "EMPTY" else name for name in arguments])
