"""benchmarks/attention.py on tiny sizes: what is compared, that it is refused where it differs, and what is written."""

import json
import math

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import attention, attention_cases, harness
from benchmarks.attention import Problem
from seq2seq import layers
from seq2seq.attention import PATTERNS, Pattern, attend
from tests.test_benchmarks import last_line, threads_as_before  # noqa: F401

TINY = ["attention", "--grid", "4", "--prefix", "3", "--batch", "1,2", "--heads", "2", "--head-dim", "8", "--convolution", "3",
        "--repeats", "1", "--threads", "1"]
ORDER = ["full", "row", "column", "convolution"]
PROBLEM = Problem("row", batch=2, grid=4, prefix=3, convolution=3, heads=2, head_dim=8, device="cpu", dtype="float32")


@pytest.fixture
def here(monkeypatch):
    """Memory cases run in this process, once, and need the MiB of their turn."""
    asked = []

    def peak(build, arguments, device, threads):
        harness.build_case(build, json.loads(json.dumps(arguments)))()
        asked.append((build, arguments, device, threads))
        return float(len(asked))

    monkeypatch.setattr(attention, "peak_memory", peak)
    return asked


@pytest.mark.parametrize(("prefix", "pairs"), [
    (0, {"full": 10, "row": 9, "column": 6, "convolution": 10}),  # by hand; of 4 x 4. Row: slot 3 no longer sees slot 0
    (1, {"full": 15, "row": 14, "column": 11, "convolution": 15})])  # of 5 x 5: all 5 see the prefix
def test_share_of_pairs_seen_of_a_2x2_grid_by_hand(prefix, pairs):
    slots = prefix + 4
    assert list(pairs) == list(PATTERNS)
    for name, seen in pairs.items():
        assert attention.share_of_pairs_seen(Pattern(name, prefix, 2, 3), slots) == seen / slots**2


def test_both_sides_run_what_they_are_said_to_run(monkeypatch):
    calls = []
    real = attention_cases.F.scaled_dot_product_attention
    monkeypatch.setattr(layers, "attend", lambda pattern, *rest: calls.append(pattern) or attend(pattern, *rest))
    heads = attention.make_heads(PROBLEM)
    assert heads.query.shape == (2, 2, 3 + 16, 8)
    assert heads.query.transpose(1, 2).is_contiguous()  # as a projection leaves it
    ours = attention.run_step("forward", attention.make_attend("ours", PROBLEM), heads)
    assert calls == [Pattern("row", 3, 4, 3)]
    masks = []
    monkeypatch.setattr(attention_cases.F, "scaled_dot_product_attention",
                        lambda *inputs, attn_mask: masks.append(attn_mask) or real(*inputs, attn_mask=attn_mask))
    peer = attention.run_step("forward", attention.make_attend("peer", PROBLEM), heads)
    assert len(calls) == len(masks) == len(ours) == len(peer) == 1
    assert torch.equal(masks[0], Pattern("row", 3, 4, 3).mask(19))
    assert not ours[0].requires_grad


def test_backward_gives_the_gradients_of_query_key_and_value():
    heads = attention.make_heads(PROBLEM)
    output, *gradients = attention.run_step("forward+backward", attention.make_attend("peer", PROBLEM), heads)
    assert not output.requires_grad
    assert [part.shape for part in gradients] == [heads.query.shape] * 3
    assert all(part.grad is None for part in heads)  # nothing adds up over the rounds
    step = 1e-2
    moved = heads._replace(value=(heads.value.detach() + step * heads.upstream).requires_grad_())
    after = attention.run_step("forward", attention.make_attend("peer", PROBLEM), moved)[0]
    rise = ((after - output) * heads.upstream).sum()  # the output is linear in the value
    assert rise.item() == pytest.approx(step * (gradients[2] * heads.upstream).sum().item(), rel=1e-3)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", list(harness.DTYPES))
def test_ours_and_the_dense_mask_do_the_same_work(name, dtype):
    row = attention.verify(PROBLEM._replace(pattern=name, dtype=dtype))
    assert row["ok"]
    assert (row["pattern"], row["batch"], row["dtype"]) == (name, 2, dtype)
    assert max(row["output_gap"], row["gradient_gap"]) < {"float32": 2e-6, "bfloat16": 3e-2}[dtype]


def sees_one_row_less(pattern, query, key, value, *rest):
    return attend(Pattern(pattern.name, pattern.prefix, pattern.columns - 1, pattern.convolution), query, key, value, *rest)


def doubles_gradients(*inputs):
    out = attend(*inputs)
    return 2 * out - out.detach()


def loses_the_values_gradient(pattern, query, key, value, *rest):
    return attend(pattern, query, key, value.detach(), *rest) + 0 * value


def is_wrong_without_gradients(*inputs):
    return attend(*inputs) * (1 if torch.is_grad_enabled() else 1.001)


def is_wrong_with_gradients(*inputs):
    out = attend(*inputs)
    return out + 0.01 if torch.is_grad_enabled() else out


def gives_a_nan_with_gradients(*inputs):
    out = attend(*inputs)
    return out if not torch.is_grad_enabled() else torch.cat([out[:, :, :-1], out[:, :, -1:] * math.nan], dim=2)


@pytest.mark.parametrize(("wrong", "output", "gradient"), [
    (sees_one_row_less, True, True), (doubles_gradients, False, True), (loses_the_values_gradient, False, True),
    (is_wrong_without_gradients, True, False), (is_wrong_with_gradients, True, False),
    (gives_a_nan_with_gradients, True, True)])
def test_a_wrong_implementation_is_refused(wrong, output, gradient, monkeypatch):
    monkeypatch.setattr(layers, "attend", wrong)
    row = attention.verify(PROBLEM)
    assert not row["ok"]
    for gap, is_wrong in ((row["output_gap"], output), (row["gradient_gap"], gradient)):
        assert (gap is None or gap > row["tolerance"]) == is_wrong
    if wrong is gives_a_nan_with_gradients:
        assert row["output_gap"] is None


def test_one_key_too_many_for_one_slot_of_many_is_refused(monkeypatch):
    problem = PROBLEM._replace(pattern="full", batch=1, grid=16, heads=1)
    right, last = Pattern.mask, problem.slots - 1

    def one_more(pattern, slots):
        mask = right(pattern, slots)
        mask[last - 1, last] = True
        return mask

    monkeypatch.setattr(Pattern, "mask", one_more)
    assert not attention.verify(problem)["ok"]


def test_unequal_work_ends_with_1_and_nothing_is_timed(here, capsys, monkeypatch):
    monkeypatch.setattr(layers, "attend", sees_one_row_less)
    monkeypatch.setattr(attention, "time_alternating", lambda *_: pytest.fail("timed"))
    assert command.main(TINY) == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    assert not document["ok"]
    assert document["rows"] == here == []
    assert "ratio" not in printed.out
    assert "do not do the same work, so nothing was timed: pattern row, batch 1, dtype float32" in printed.err.splitlines()[-1]


def test_a_run_measures_every_pattern_and_ends_with_one_json_document(here, capsys, tmp_path):
    out = tmp_path / "result.json"
    assert command.main([*TINY, "--dtype", "bfloat16", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    assert document == json.loads(out.read_text())
    assert document["options"] == {
        "quick": False, "grid": 4, "prefix": 3, "batches": [1, 2], "heads": 2, "head_dim": 8, "convolution": 3, "repeats": 1,
        "device": "cpu", "dtype": "bfloat16", "threads": 1}
    assert (document["benchmark"], document["ok"], document["notes"]) == ("attention", True, [])
    assert document["environment"]["torch_threads"] == 1
    assert document["peer"] == {"name": attention.PEER_NAME, "version": torch.__version__}
    checked = [(row["batch"], row["pattern"], row["dtype"], row["ok"]) for row in document["verification"]]
    assert checked == [(batch, name, dtype, True) for batch in (1, 2) for name in ORDER for dtype in ("float32", "bfloat16")]
    rows = document["rows"]
    assert [(row["batch"], row["step"], row["pattern"]) for row in rows] == [
        (batch, step, name) for batch in (1, 2) for step in ("forward", "forward+backward") for name in ORDER]
    for number, row in enumerate(rows):
        assert row["ratio"] > 0
        assert row["ideal_ratio"] == pytest.approx(1 / row["share_of_pairs_seen"], rel=1e-3)
        assert (row["ours"]["peak_memory_mib"], row["peer"]["peak_memory_mib"]) == (2 * number + 1, 2 * number + 2)
        build, asked, device, threads = here[2 * number]
        assert (build, device, threads) == ("benchmarks.attention_cases:step_case", "cpu", 1)
        assert asked == {"side": "ours", "step": row["step"], "pattern": row["pattern"], "batch": row["batch"], "grid": 4,
                         "prefix": 3, "convolution": 3, "heads": 2, "head_dim": 8, "device": "cpu", "dtype": "bfloat16"}
    assert rows[0]["share_of_pairs_seen"] == pytest.approx(19 * 20 / 2 / 19**2, abs=1e-6)
    assert "forward+backward, batch 2" in printed.err
    assert "ideal_ratio" in printed.out.splitlines()[1]


def test_all_patterns_of_both_sides_take_turns_and_the_ratio_is_the_peers_time_by_ours(monkeypatch):
    seen = []

    def timer(candidates, repeats, device):
        seen.append((list(candidates), repeats, device))
        return {name: harness.Timing([1.0, 2.0] if name.endswith("ours") else [3.0, 8.0]) for name in candidates}

    monkeypatch.setattr(attention, "time_alternating", timer)
    monkeypatch.setattr(attention, "peak_memory", lambda *_: 0.0)
    rows = attention.speed(attention.parse([*TINY[1:], "--batch", "1", "--repeats", "2"])[0])
    assert {(row["ratio"], row["ours"]["median_s"], row["peer"]["median_s"]) for row in rows} == {(3.5, 1.5, 5.5)}
    assert seen == [([f"{name} {side}" for name in ORDER for side in ("ours", "peer")], 2, "cpu")] * 2


def test_quick_measures_memory_of_forward_and_backward_alone(here, capsys):
    assert command.main([*TINY, "--quick", "--batch", "1"]) == 0
    printed = capsys.readouterr().out
    memory = {(row["step"], side): row[side]["peak_memory_mib"] for row in json.loads(printed.splitlines()[-1])["rows"]
              for side in ("ours", "peer")}
    assert memory == {("forward", "ours"): None, ("forward", "peer"): None, ("forward+backward", "ours"): 7.0,
                      ("forward+backward", "peer"): 8.0}
    assert [arguments["step"] for _, arguments, _, _ in here] == ["forward+backward"] * 8
    assert printed.splitlines()[2].endswith("-")


def test_defaults_are_dall_es_grid_and_text_and_quick_is_smaller():
    full, quick = (attention.parse(argv)[0] for argv in ([], ["--quick"]))
    assert (full.grid, full.prefix, full.convolution, full.device, full.dtype) == (32, 256, 11, "cpu", "float32")
    assert full.problem("row", 1).slots == 1280
    sizes = [part.problem("row", max(part.batches)) for part in (full, quick)]
    numbers = [size.batch * size.heads * size.slots * size.head_dim for size in sizes]
    assert numbers[1] < numbers[0] / 10
    assert attention.parse(["--quick", "--heads", "5"])[0].heads == 5


def test_a_convolution_over_the_whole_grid_is_noted(here, capsys):
    assert command.main([*TINY, "--convolution", "7", "--batch", "1", "--quick"]) == 0
    document = last_line(capsys)
    assert document["notes"] == ["a convolution of 7 covers all of 4 x 4 slots: it sees what full attention sees"]
    shares = {row["pattern"]: row["share_of_pairs_seen"] for row in document["rows"]}
    assert shares["convolution"] == shares["full"]


def test_compiled_code_is_forgotten_on_cuda_alone(monkeypatch):
    forgotten = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(1))
    attention.forget_compiled("cpu")
    assert forgotten == []
    attention.forget_compiled("cuda")
    assert forgotten == [1]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--grid", "0"], "--grid 0 must be at least 1"),
    (["--grid", "x"], "argument --grid: invalid int value: 'x'"),
    (["--grid", "127", "--prefix", "256"], "--grid 127 and --prefix 256 are 16,385 slots; the peer's mask"),
    (["--prefix", "-1"], "--prefix -1 must be at least 0"),
    (["--batch", "0"], "--batch '0': expected whole numbers of at least 1"),
    (["--batch", "1000000"], "make a query of 655,360,000,000 numbers; at most 2,147,483,648"),
    (["--heads", "0"], "--heads 0 must be at least 1"),
    (["--head-dim", "0"], "--head-dim 0 must be at least 1"),
    (["--convolution", "1"], "--convolution 1 must be at least 3"),
    (["--convolution", "4"], "--convolution 4 must be odd"),
    (["--threads", "0"], "--threads 0 must be at least 1"),
    (["--repeats", "0"], "--repeats 0 must be at least 1"),
    (["--dtype", "fp8"], "invalid choice: 'fp8'"),
    (["--device", "tpu"], "invalid choice: 'tpu'"),
    (["--out", "/proc/all.json"], "--out /proc/all.json: cannot be written"),
    (["--gird", "4"], "unrecognized arguments: --gird 4")])
def test_mistakes_are_one_line_before_anything_is_measured(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(attention, "measure", lambda options: pytest.fail("measured"))
    assert command.main(["attention", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err


def test_a_head_too_narrow_for_cuda_and_a_gpu_that_is_not_there_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["attention", "--device", "cuda"]) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.main(["attention", "--device", "cuda", "--head-dim", "8"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "no usable GPU" in first
    assert "--head-dim 8 must be at least 16 on CUDA" in second


def test_the_command_is_listed_and_has_help(capsys):
    assert command.main(["--help"]) == 0
    assert "attention" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        command.main(["attention", "--help"])
    assert stopped.value.code == 0
    assert "--head-dim" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_of_a_case_in_a_process_of_its_own():
    options = attention.parse(["--grid", "32", "--batch", "4", "--heads", "4", "--threads", "1"])[0]
    peak = options.peak("peer", "forward", options.problem("row", 4))
    output = 4 * 4 * 1280 * 64 * 4 / harness.MIB
    assert output <= peak < 8 * output  # nothing of importing and building
