"""What a command imports, and where it keeps what takes time: the second call begins quickly."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

import tokenloom
from inference.decoder.choices import KEPT, is_thorough
from inference.memory import parts
from tests import command_line, launching
from tokenizer_image import VQGANConfig
from tokenloom_common.imports import import_before_torch

HEAVY = ("torch._dynamo", "torch._inductor", "torchvision", "matplotlib", "datasets", "deepspeed", "transformers", "pyarrow",
         "starlette", "uvicorn", "networkx", "training", "pandas")
COMMAND = ("import sys, tokenloom; code = tokenloom.main(sys.argv[1:]);"
           f"print(code, *[name for name in {HEAVY!r} if name in sys.modules])")
folder = command_line.folder


@pytest.mark.long
def test_a_second_generate_imports_no_compiler_and_no_library_of_training(folder, tmp_path):
    environment = {**launching.environment(), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    argv = ["generate", "a red heart", "--model", str(folder), "--out", str(tmp_path / "out")]
    for _ in range(2):  # the first counts the memory of decoding, and keeps it
        done = subprocess.run([sys.executable, "-c", COMMAND, *argv], cwd=launching.REPOSITORY, env=environment,
                              capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"a-red-heart-seed0.png", "a-red-heart-seed0-1.png"}
    assert (tmp_path / "cache" / "tokenloom" / "memory.json").is_file()


@pytest.mark.long
@pytest.mark.parametrize("argv", ["--help", "--version", "data --help", "generate --help", "calibrate --help"])
def test_help_imports_no_torch(argv):
    code = ("import sys, tokenloom\n"
            "try: tokenloom.main(sys.argv[1:])\n"
            "except SystemExit: pass\n"
            "print([name for name in ('torch', 'einx', 'numba', 'numpy') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, *argv.split()], cwd=launching.REPOSITORY, env=launching.environment(),
                          capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_after_torch_nothing_is_imported_early(monkeypatch):
    monkeypatch.delitem(sys.modules, "einx", raising=False)
    import_before_torch()
    assert "einx" not in sys.modules


@pytest.mark.long
def test_the_collector_rests_while_torch_is_imported_and_not_after_it():
    code = ("import gc\n"
            "from tokenloom_common.imports import importing_torch\n"
            "with importing_torch():\n"
            "    on = gc.isenabled()\n"
            "    import torch\n"
            "kept = gc.get_freeze_count()\n"
            "with importing_torch():\n"
            "    rest = [[] for _ in range(1000)]\n"
            "print(on, gc.isenabled(), kept > 100_000, gc.get_freeze_count() == kept)")
    done = subprocess.run([sys.executable, "-c", code], cwd=launching.REPOSITORY, env=launching.environment(),
                          capture_output=True, text=True, check=True)
    assert done.stdout == "False True True True\n"


# ---- the memory of decoding


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """How often the memory of decoding was counted, with an empty cache."""
    calls = []
    monkeypatch.setattr("tokenloom_common.kept_results.cache_folder", lambda: tmp_path)
    monkeypatch.setattr(parts, "_count_picture_bytes", lambda config: calls.append(config) or (3, 5))
    return calls


def decoding(resolution: int = 16) -> tuple[int, int]:
    return parts.picture_bytes.__wrapped__(VQGANConfig(resolution=resolution, codebook_size=8, channels=8, norm_groups=4,
                                                       channel_multipliers=(1, 2), attention_resolutions=()))


def test_memory_is_counted_once_per_config(counted):
    assert [decoding(), decoding(), decoding(32), decoding(32)] == [(3, 5)] * 4
    assert [config.resolution for config in counted] == [16, 32]


@pytest.mark.parametrize("value", [None, 3, [], [1], [1, 2, 3], [1, -2], [0, 1], [1.5, 2], ["1", 2], [True, 2], {"a": 1}])
def test_impossible_counts_are_counted_anew(counted, tmp_path, value):
    decoding()
    path = tmp_path / "memory.json"
    (key,) = json.loads(path.read_text())["results"]
    parts.KEPT.put(key, value)
    assert decoding() == (3, 5)
    assert len(counted) == 2
    assert parts.KEPT.get(key) == [3, 5]


# ---- tokenloom calibrate


@pytest.mark.long
def test_calibrate_prints_what_it_measures_and_keeps_it(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tokenloom_common.kept_results.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("inference.commands.calibrate.free_cores", lambda: 2)
    monkeypatch.setattr("inference.commands.calibrate.usable_cores", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    assert tokenloom.main(["calibrate", str(folder)]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert shown.err == ""
    assert lines[0].startswith("processor: ")
    assert [line.split(": ")[1] for line in lines[1:3]] == ["too small for a choice"] * 2
    assert [line.split(" rows:")[0] for line in lines[3:-1]] == [f"step of {rows:>2}" for rows in (1, 2, 4, 8, 16, 32, 64)]
    assert all("1 thread " in line and "2 threads " in line and " ms -> " in line for line in lines[3:-1])
    assert lines[-1] == f"kept in {tmp_path / 'calibration.json'}"
    keys = json.loads((tmp_path / "calibration.json").read_text())["results"]
    assert len(keys) == 7
    assert all(is_thorough(key) for key in keys)


def test_calibrate_says_when_the_machine_is_busy(folder, capsys, monkeypatch):
    monkeypatch.setattr("inference.commands.calibrate.free_cores", lambda: 1)
    monkeypatch.setattr("inference.commands.calibrate.usable_cores", lambda: 4)
    assert tokenloom.main(["calibrate", str(folder)]) == 0
    shown = capsys.readouterr()
    assert "only 1 of 4 cores are measured; run it again when the machine is quiet" in shown.err
    assert "one core: nothing to choose" in shown.out


def test_calibrate_refuses_a_cache_that_cannot_be_written_before_the_model(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tokenloom_common.kept_results.cache_folder", lambda: tmp_path / "file")
    assert tokenloom.main(["calibrate", "/nowhere/model"]) == 2
    shown = capsys.readouterr()
    assert f"{tmp_path / 'file' / 'calibration.json'}: cannot be written to" in shown.err
    assert shown.err.count("\n") == 1
    assert KEPT.path is not None


def test_an_empty_name_is_not_the_model_that_ships(capsys):
    assert tokenloom.main(["calibrate", ""]) == 2
    assert "the model's folder is an empty name" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "rows"), [
    (["octopus"], 2), (["octopus", "--num-images", 40], 64), (["octopus", "--num-images", 40, "--guidance", 1], 32),
    (["octopus", "--num-images", 2, "--batch-size", 4], 4), (["--prompts", "p.txt", "--batch-size", 4], 4),
    (["--prompts", "p.txt", "--batch-size", 16], 6), (["--prompts", "p.txt", "--batch-size", 16, "--guidance", 1], 3)])
def test_threads_are_measured_for_the_rows_of_a_step(folder, monkeypatch, tmp_path, options, rows):
    measured = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("octopus\na red heart\na blue heart\n")
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr("inference.commands.options.thread_trial", lambda _, rows, most: measured.append(rows) or (None, ""))
    monkeypatch.setattr("inference.decoder.calibration.fastest_threads", lambda *_: None)
    monkeypatch.setattr("inference.commands.draw_captions.make_folder", lambda out: None)
    monkeypatch.setattr("inference.commands.draw_captions._draw_each", lambda *_: True)
    monkeypatch.setattr("inference.commands.draw_captions._draw_file", lambda *_: True)
    assert tokenloom.main(["generate", "--model", str(folder), "--device", "cpu", *map(str, options)]) == 0
    assert measured == [rows]


def test_calibrate_names_a_folder_that_is_not_there(capsys):
    assert tokenloom.main(["calibrate", "/nowhere/model"]) == 2
    assert "/nowhere/model: no such model folder" in capsys.readouterr().err


def test_the_same_picture_with_one_thread_and_two(folder, tmp_path):
    for threads in ("1", "2"):
        argv = ["generate", "octopus", "--model", str(folder), "--out", str(tmp_path / threads), "--threads", threads]
        assert tokenloom.main(argv) == 0
    one, two = (Image.open(tmp_path / threads / "octopus-seed0.png") for threads in ("1", "2"))
    assert one.tobytes() == two.tobytes()
