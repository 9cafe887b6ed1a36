"""What must hold on a CUDA device; `make test-all` runs these where there is one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests import launching, tiny
from tokenizer_image import load_tokenizer
from tokenloom import SamplingParams, TextToImage
from training.data.builders.shapes import build_shapes
from training.runs.metrics import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_greedy_tokens_and_pictures_are_the_same_on_cpu_and_gpu(tmp_path):
    folder = tiny.model_folder(tmp_path / "model")
    greedy = SamplingParams(temperature=0.0, guidance_scale=2.0)
    results = [TextToImage.from_pretrained(folder, device=device).generate(["a red heart", "octopus"], 2, greedy)
               for device in ("cpu", "cuda")]
    assert torch.equal(results[0].image_tokens, results[1].image_tokens)
    assert results[0].images[0].size == results[1].images[0].size


def test_the_same_seed_draws_the_same_numbers_on_cpu_and_gpu(tmp_path):
    folder = tiny.model_folder(tmp_path / "model")
    results = [TextToImage.from_pretrained(folder, device=device).sample_tokens("octopus", num_images=4, seed=3)
               for device in ("cpu", "cuda")]
    assert (results[0] == results[1]).float().mean() > 0.95


def test_bfloat16_logits_stay_near_float32():
    model = tiny.seq2seq().cuda()
    text = [part.cuda() for part in tiny.text_tokenizer().encode(["a red heart", ""])]
    tokens = torch.randint(0, 32, (2, 16), device="cuda")
    with torch.no_grad():
        exact = model(*text, tokens)
        rounded = model.bfloat16()(*text, tokens).float()
    assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_adversarial_training_in_bfloat16_on_the_gpu(tmp_path):
    build_shapes(tmp_path / "data", size=16, num_scenes=40, seed=0)
    result = subprocess.run(
        [sys.executable, "training/train_tokenizer.py", "--config", "debug_tokenizer.yaml", "--data.path", tmp_path / "data",
         "--run_dir", tmp_path / "run", "--adversarial.weight", "0.1", "--adversarial.start_step", "20",
         "--adversarial.discriminator.layers", "1", "--adversarial.r1_weight", "1", "--train.weight_ema", "0.9"],
        cwd=launching.REPOSITORY, text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert rows[-1]["l1"] < 0.75 * rows[0]["l1"]
    assert rows[-1]["skipped_steps"] == 0
    assert all(1 << 20 < row["memory_bytes"] <= torch.cuda.get_device_properties(0).total_memory for row in rows)
    assert all("mfu" not in row for row in rows)  # the discriminator's work is not counted
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = [load_tokenizer(tmp_path / "run/model", device).encode(picture.to(device)).cpu() for device in ("cpu", "cuda")]
    assert (codes[0] == codes[1]).float().mean() > 0.98


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_patterns_train_with_and_without_dropout(dropout):
    """Parti's presets have both; flex attention has no dropout."""
    model = tiny.seq2seq(attention=("convolution", "row"), dropout=dropout).cuda().train()
    text = [part.cuda() for part in tiny.text_tokenizer().encode(["a red heart"] * 4)]
    tokens = torch.randint(0, 32, (4, 16), device="cuda")
    model(*text, tokens).image.float().square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
