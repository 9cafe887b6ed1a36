"""What a matcher learns from: the contrastive loss and hidden words, by hand and against plain references."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch import Tensor

from inference.scoring.matcher import Embeddings
from seq2seq.losses import mask_text, masked_text_loss
from seq2seq.text_tokenizer import END, NULL, PAD, UNKNOWN
from tests import tiny
from training.config.matcher import MatcherLossConfig
from training.data.visits.captioned import same_captions
from training.objectives.matcher import MatcherWithTextHead, batch_accuracy, contrastive_loss

# ---- the contrastive loss ----

def unit(*rows: tuple[float, ...]) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


def test_the_contrastive_loss_by_hand():
    same = unit((1.0, 0.0), (0.0, 1.0))
    loss = contrastive_loss(Embeddings(same, same), torch.tensor(2.0), torch.eye(2, dtype=torch.bool))
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2)))
    swapped = contrastive_loss(Embeddings(same, same.flip(0)), torch.tensor(2.0), torch.eye(2, dtype=torch.bool))
    assert float(swapped) == pytest.approx(math.log(1 + math.exp(2)))


def reference_loss(image: numpy.ndarray, text: numpy.ndarray, scale: float, captions: list[str]) -> float:
    """One row and one right answer at a time."""
    def one_way(logits: numpy.ndarray) -> float:
        total = 0.0
        for row in range(len(captions)):
            right = [column for column in range(len(captions)) if captions[column] == captions[row]]
            log_sum = math.log(sum(math.exp(value) for value in logits[row]))
            total += sum(log_sum - logits[row, column] for column in right) / len(right)
        return total / len(captions)
    logits = scale * image @ text.T
    return (one_way(logits) + one_way(logits.T)) / 2


@pytest.mark.parametrize("captions", [["a", "b", "c", "d", "e"], ["a", "b", "a", "c", "a"], ["a"] * 5])
def test_the_contrastive_loss_equals_a_plain_reference_with_several_right_answers(captions):
    generator = torch.Generator().manual_seed(1)
    image, text = (torch.nn.functional.normalize(torch.randn(5, 7, generator=generator), dim=-1) for _ in range(2))
    found = contrastive_loss(Embeddings(image, text), torch.tensor(5.0), same_captions(captions))
    expected = reference_loss(image.double().numpy(), text.double().numpy(), 5.0, captions)
    assert float(found) == pytest.approx(expected, abs=1e-5)
    if len(set(captions)) == 5:
        logits = 5.0 * image @ text.T
        plain = sum(torch.nn.functional.cross_entropy(way, torch.arange(5)) for way in (logits, logits.T)) / 2
        assert float(found) == pytest.approx(float(plain), abs=1e-6)


def test_equal_captions_are_found_whatever_their_case_and_counted_as_right():
    same = same_captions(["A red heart", "a cat", "a RED heart"])
    assert same.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    axes = torch.eye(3)
    assert float(batch_accuracy(Embeddings(axes, axes[[2, 1, 0]]), same)) == 1
    assert float(batch_accuracy(Embeddings(axes, axes[[2, 0, 1]]), same)) == pytest.approx(1 / 3)


# ---- masked words ----

def test_words_are_hidden_at_the_published_rates():
    generator = torch.Generator().manual_seed(0)
    text_ids = torch.randint(NULL + 1, 1000, (400, 100), generator=generator)
    text_ids[:, 80], text_ids[:, 81:] = END, PAD
    text_ids[0] = torch.tensor([NULL, END] + [PAD] * 98)
    hidden, predicted = mask_text(text_ids, 1000, generator)
    assert not predicted[text_ids <= NULL].any()
    assert torch.equal(hidden[~predicted], text_ids[~predicted])
    words = predicted[1:, :80]
    assert float(words.float().mean()) == pytest.approx(0.15, abs=0.01)
    fed, real = hidden[predicted], text_ids[predicted]
    assert float((fed == UNKNOWN).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((fed == real).float().mean()) == pytest.approx(0.1, abs=0.02)
    other = fed[(fed != UNKNOWN) & (fed != real)]
    assert len(other) / len(fed) == pytest.approx(0.1, abs=0.02)
    assert int(other.min()) > NULL
    assert int(other.max()) < 1000


def test_no_caption_contains_the_mask():
    odd = ["漢字 🎉", "a\x00b", "<unk>", "�", "zzz ⁇ q"]
    assert not (tiny.text_tokenizer().encode([*tiny.CAPTIONS, *odd]).text_input == UNKNOWN).any()


def test_only_hidden_words_are_predicted_and_none_is_no_loss():
    model = tiny.matcher()
    objective = MatcherWithTextHead(model, MatcherLossConfig(mlm_weight=1.0)).eval()
    text_ids, mask = tiny.text_tokenizer().encode(["a red heart", "a blue circle"])
    predicted = torch.zeros_like(mask)
    predicted[0, 1], predicted[1, 2] = True, True
    hidden = torch.where(predicted, UNKNOWN, text_ids)
    logits = objective(torch.zeros(2, 3, 16, 16), text_ids, mask, hidden, predicted).text_logits
    assert logits.shape == (2, tiny.text_tokenizer().vocab_size)
    memory = model.text_encoder(hidden, mask)
    alone = objective.head(memory[1, 2][None], model.text_encoder.text_input.embedding.weight)
    torch.testing.assert_close(logits[1:], alone)
    expected = -logits.log_softmax(-1)[[0, 1], [int(text_ids[0, 1]), int(text_ids[1, 2])]].mean()
    assert float(masked_text_loss(logits.detach(), text_ids[predicted])) == pytest.approx(float(expected.detach()), abs=1e-6)
    nothing = objective(torch.zeros(2, 3, 16, 16), text_ids, mask, text_ids, torch.zeros_like(mask)).text_logits
    assert float(masked_text_loss(nothing.detach(), text_ids[torch.zeros_like(mask)])) == 0
