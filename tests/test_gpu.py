"""What must hold on a CUDA device; `make test-all` runs these where there is one."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tokenloom import SamplingParams, TextToImage

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
