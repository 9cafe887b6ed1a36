"""benchmarks/: the harness by known answers, the peer's weights, and the tokenizer benchmark on a tiny size."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import command_line, harness, tokenizer
from benchmarks.peers import diffusers_vq
from inference.checkpoints.formats.vqgan_names import diffusers_name
from tests import launching
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.config import VQGAN_PRESETS
from tokenloom_common.errors import RunFailedError, UserError

TINY = ["tokenizer", "--quick", "--repeats", "1", "--resolution", "16", "--threads", "1"]
WIDE = VQGANConfig(**{**VQGAN_PRESETS["debug"].plain(), "attention_resolutions": [8, 4], "channel_multipliers": [1, 2, 3],
                      "num_res_blocks": 2, "resolution": 16})


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(monkeypatch):
    """Memory cases run in this process, once, and need the MiB of their turn."""
    asked = []

    def peak(build, arguments, device, threads):
        harness.build_case(build, json.loads(json.dumps(arguments)))()
        asked.append((build, arguments, device, threads))
        return float(len(asked))

    monkeypatch.setattr(tokenizer, "peak_memory", peak)
    return asked


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---- harness

def test_candidates_take_turns_and_every_second_round_runs_backwards():
    calls = []
    timed = harness.time_alternating({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(timing.seconds) for name, timing in timed.items()} == {"a": 3, "b": 3}


def test_statistics_by_hand():
    assert harness.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0)
    assert harness.quartiles([7.0]) == (7.0, 7.0, 7.0)
    ours, theirs = harness.Timing([1.0, 2.0, 10.0]), harness.Timing([2.0, 6.0, 10.0])
    assert harness.speed_ratio(ours, theirs) == 2.0  # of 2, 3, 1; the ratio of the medians would be 3
    assert ours.plus(theirs).seconds == [3.0, 8.0, 20.0]
    assert ours.summary() == {"median_s": 2.0, "quartile1_s": 1.5, "quartile3_s": 6.0}


def sleeper():
    """A case for the test of `time_alternating`'s clock."""
    return lambda: __import__("time").sleep(0.02)


def test_a_known_time_is_measured():
    timing = harness.time_alternating({"sleep": sleeper()}, repeats=3)["sleep"]
    assert 0.02 <= min(timing.seconds) < 0.2


def allocation(mib: int):
    """A case that needs `mib` MiB, and twice that while it is built."""
    torch.ones(2 * mib * harness.MIB // 4).sum()
    return lambda: torch.ones(mib * harness.MIB // 4).sum()


@pytest.mark.long
def test_peak_memory_is_the_cases_own_and_not_the_parents_or_the_builders():
    ballast = torch.ones(400 * harness.MIB // 4)
    assert 63 <= harness.peak_memory("tests.test_benchmarks:allocation", {"mib": 64}, "cpu", threads=1) < 72
    assert ballast[0] == 1


def broken():
    raise ValueError("no such thing")


@pytest.mark.long
def test_a_child_that_fails_is_one_line():
    with pytest.raises(RunFailedError, match=r"memory of tests.test_benchmarks:broken \{\}: ValueError: no such thing"):
        harness.peak_memory("tests.test_benchmarks:broken", {}, "cpu", threads=1)


def test_table_lines_up_and_shows_none_as_a_dash():
    text = command_line.table([{"name": "a", "x": None}, {"name": "long", "x": 1234.5}])
    assert text.splitlines() == ["name      x", "   a      -", "long  1,234"]
    assert command_line.table([]) == ""


# ---- the peer

@pytest.mark.parametrize(("ours", "theirs"), [
    ("encoder.down.2.block.1.nin_shortcut.weight", "encoder.down_blocks.2.resnets.1.conv_shortcut.weight"),
    ("encoder.down.0.downsample.conv.bias", "encoder.down_blocks.0.downsamplers.0.conv.bias"),
    ("encoder.down.4.attn.1.q.weight", "encoder.down_blocks.4.attentions.1.to_q.weight"),
    ("decoder.up.4.attn.0.proj_out.bias", "decoder.up_blocks.0.attentions.0.to_out.0.bias"),
    ("decoder.up.1.upsample.conv.weight", "decoder.up_blocks.3.upsamplers.0.conv.weight"),
    ("decoder.up.0.block.2.norm1.weight", "decoder.up_blocks.4.resnets.2.norm1.weight"),
    ("encoder.mid.attn_1.norm.weight", "encoder.mid_block.attentions.0.group_norm.weight"),
    ("decoder.mid.block_2.conv1.weight", "decoder.mid_block.resnets.1.conv1.weight"),
    ("decoder.norm_out.weight", "decoder.conv_norm_out.weight"), ("quant_conv.bias", "quant_conv.bias")])
def test_names_in_diffusers(ours, theirs):
    assert diffusers_name(ours, 5) == theirs


@pytest.mark.long
def test_published_sizes_map_onto_diffusers_names_and_shapes_exactly():
    models = pytest.importorskip("diffusers")
    for name in ("vqgan-f16-1024", "vq-8"):
        with torch.device("meta"):
            ours = VQGAN(VQGAN_PRESETS[name])
            theirs = models.VQModel(**diffusers_vq.diffusers_config(ours.config))
        mapped = {key: tuple(tensor.shape) for key, tensor in diffusers_vq.diffusers_state(ours).items()}
        assert mapped == {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}


@pytest.mark.parametrize("preset", ["debug", "wide", "distance"])
def test_peer_with_our_weights_gives_our_codes_and_pictures(preset, monkeypatch):
    pytest.importorskip("diffusers")
    distance = {**WIDE.plain(), "quantizer": {"l2_normalize": False}}
    monkeypatch.setitem(VQGAN_PRESETS, "wide", WIDE)
    monkeypatch.setitem(VQGAN_PRESETS, "distance", VQGANConfig(**distance))
    ours = tokenizer.make_tokenizer(preset, 32, "cpu", "float32")
    result = diffusers_vq.verify(ours, diffusers_vq.Peer(ours), tokenizer.make_image(2, 32))
    assert result["ok"]
    assert result["codes_equal_share"] == 1
    assert result["codes_used"] > 8
    assert result["picture_max_abs_difference"] < 2e-5


def test_unequal_work_is_seen():
    pytest.importorskip("diffusers")
    ours, image = tokenizer.make_tokenizer("debug", 16, "cpu", "float32"), tokenizer.make_image(2, 16)
    for part in ("quantize.embedding.weight", "decoder.conv_out.weight", "encoder.conv_in.weight"):
        peer = diffusers_vq.Peer(ours)
        with torch.no_grad():
            tensor = peer.model.get_parameter(part)
            tensor.copy_(tensor * 1.2 if "conv_out" in part else tensor.roll(1, dims=0))
        assert not diffusers_vq.verify(ours, peer, image)["ok"], part


def test_a_constant_code_proves_nothing():
    pytest.importorskip("diffusers")
    ours = tokenizer.make_tokenizer("debug", 16, "cpu", "float32")
    with torch.no_grad():
        ours.quant_conv.weight.zero_()
    result = diffusers_vq.verify(ours, diffusers_vq.Peer(ours), tokenizer.make_image(1, 16))
    assert result["codes_equal_share"] == 1
    assert not result["ok"]


def test_weights_are_the_same_at_every_resolution_and_attention_keeps_its_level(monkeypatch):
    monkeypatch.setitem(VQGAN_PRESETS, "wide", WIDE)
    small, large = (tokenizer.make_tokenizer("wide", side, "cpu", "float32") for side in (16, 48))
    assert large.config.attention_resolutions == (24, 12)
    assert all(torch.equal(tensor, large.state_dict()[name]) for name, tensor in small.state_dict().items())


def test_latents_spread_as_the_codes_do():
    model = tokenizer.make_tokenizer("debug", 16, "cpu", "float32")
    with torch.no_grad():
        latents = model.latents(tokenizer.make_image(4, 4 * model.config.downsampling))
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), model.codebook.std(dim=0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), model.codebook.mean(dim=0), rtol=0, atol=1e-4)


# ---- the command

@pytest.mark.long
def test_quick_run_measures_everything_and_ends_with_one_json_document(here, capsys, tmp_path):
    pytest.importorskip("diffusers")
    out = tmp_path / "result.json"
    assert command.main([*TINY, "--batch", "1,3", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    assert document == json.loads(out.read_text())
    assert document["ok"]
    assert document["options"] == {"quick": True, "preset": "debug", "batches": [1, 3], "resolutions": [16], "repeats": 1,
                                   "device": "cpu", "dtype": "float32", "threads": 1}
    assert document["environment"]["torch_threads"] == 1
    checked = [(row["batch"], row["codes_equal_share"], row["ok"]) for row in document["verification"]]
    assert checked == [(1, 1, True), (3, 1, True)]
    assert [(row["step"], row["batch"]) for row in document["rows"]] == [
        (step, batch) for batch in (1, 3) for step in ("encode", "decode", "encode+decode")]
    encode, decode, both = document["rows"][3:]
    assert both["ours"]["median_s"] == pytest.approx(encode["ours"]["median_s"] + decode["ours"]["median_s"], abs=2e-6)
    assert both["peer"]["images_per_s"] == pytest.approx(3 / both["peer"]["median_s"], rel=1e-2)
    assert both["ratio"] == pytest.approx(both["peer"]["median_s"] / both["ours"]["median_s"], rel=1e-2)
    assert both["ours"]["peak_memory_mib"] == max(encode["ours"]["peak_memory_mib"], decode["ours"]["peak_memory_mib"])
    assert [(row["step"], row["way"], row["side"]) for row in document["tiling"]] == [
        (step, way, 48) for step in ("encode", "decode") for way in ("whole", "tiled")]
    assert [row["codebook_size"] for row in document["nearest"]] == [1024, 65_536]
    assert [row["checkpointing"] for row in document["gradient_checkpointing"]] == ["off", "on"]
    assert len(here) == 8 + 4 + 2 + 2
    assert "encode and decode: 16 px, batch 3" in printed.err
    assert "nearest code" in printed.out


@pytest.mark.long
def test_without_diffusers_our_own_rows_are_measured(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert command.main([*TINY, "--batch", "1", "--dtype", "bfloat16"]) == 0
    document = last_line(capsys)
    assert document["peer"] is None
    assert document["peer_missing"] == "pip install diffusers"
    assert document["verification"] == []
    assert all(row["peer"] is None and row["ratio"] is None and row["ours"]["images_per_s"] > 0 for row in document["rows"])
    assert any("diffusers" in note for note in document["notes"])
    assert all(arguments.get("side") != "peer" for _, arguments, _, _ in here)


def test_unequal_work_ends_with_1_and_nothing_is_timed(here, capsys, monkeypatch):
    pytest.importorskip("diffusers")
    right = diffusers_vq.diffusers_state
    monkeypatch.setattr(diffusers_vq, "diffusers_state", lambda model: {
        name: tensor * 1.2 if name == "decoder.conv_out.weight" else tensor for name, tensor in right(model).items()})
    assert command.main(TINY) == 1
    printed = capsys.readouterr()
    document = json.loads(printed.out.splitlines()[-1])
    assert not document["ok"]
    assert document["rows"] == document["tiling"] == []
    assert here == []
    assert "do not do the same work, so nothing was timed: resolution 16, batch 2" in printed.err.splitlines()[-1]


@pytest.mark.long
def test_a_tokenizer_without_checkpointing_is_noted(here, capsys, monkeypatch):
    monkeypatch.setattr(tokenizer, "has_checkpointing", lambda model: False)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert command.main([*TINY, "--batch", "1"]) == 0
    document = last_line(capsys)
    assert document["gradient_checkpointing"] == []
    assert any("gradient_checkpointing" in note for note in document["notes"])


def test_checkpointing_rows_switch_it_on(monkeypatch):
    seen = []
    monkeypatch.setattr(VQGAN, "gradient_checkpointing", property(lambda self: False, lambda self, on: seen.append(on)))
    model = {"preset": "debug", "resolution": 16, "device": "cpu", "dtype": "float32"}
    for on in (False, True):
        tokenizer.training_case(on, 1, **model)()
    assert seen == [False, True]


@pytest.mark.parametrize(("arguments", "message"), [
    (["tokenizr"], "unknown benchmark 'tokenizr'; did you mean 'tokenizer'?"),
    (["tokenizer", "--batch", "0"], "--batch '0': expected whole numbers of at least 1"),
    (["tokenizer", "--batch", "1,x"], "--batch '1,x'"),
    (["tokenizer", "--resolution", "130"], "130 is not divisible by 16"),
    (["tokenizer", "--resolution", ""], "--resolution ''"),
    (["tokenizer", "--threads", "0"], "--threads 0 must be at least 1"),
    (["tokenizer", "--repeats", "0"], "--repeats 0 must be at least 1"),
    (["tokenizer", "--preset", "vq16"], "unknown preset 'vq16'; did you mean 'vq-16'?"),
    (["tokenizer", "--dtype", "fp8"], "invalid choice: 'fp8'"),
    (["tokenizer", "--out", "/proc/all.json"], "--out /proc/all.json: cannot be written"),
    (["tokenizer", "--out", "."], "--out .: is a folder; give a file's name"),
    (["tokenizer", "--bach", "1"], "unrecognized arguments: --bach 1")])
def test_mistakes_are_one_line_before_anything_is_measured(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(tokenizer, "measure", lambda options: pytest.fail("measured"))
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no usable GPU"):
        harness.start("cuda", None)
    assert command.main(["tokenizer", "--device", "cuda"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_lists_the_benchmarks(capsys):
    assert command.main(["--help"]) == 0
    assert "tokenizer" in capsys.readouterr().out
    assert command.main([]) == 2
    with pytest.raises(SystemExit) as stopped:
        command.main(["tokenizer", "--help"])
    assert stopped.value.code == 0


@pytest.mark.slow
def test_the_quick_command_as_people_run_it():
    done = subprocess.run([sys.executable, "-m", "benchmarks", *TINY], cwd=launching.REPOSITORY, capture_output=True, text=True,
                          env=launching.environment(), timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["ok"]
    small, large = document["nearest"]
    assert large["peak_memory_mib"] < large["all_scores_mib"] / 2  # blocks of distances, never all of them
    assert all(0 < row["peak_memory_mib"] < 200 for part in ("tiling", "gradient_checkpointing") for row in document[part])
    assert small["share_of_all_scores"] is None
