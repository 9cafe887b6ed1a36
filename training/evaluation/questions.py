"""What a generator is asked: rows of a split, a caption of each, and the concept that its picture should show."""

from __future__ import annotations

import random
from typing import NamedTuple

from training.data.sources.captioned_images import CaptionedImages
from training.data.visits.order import ItemId, item_random
from training.evaluation.reconstruction import choose_rows


class Question(NamedTuple):
    """caption: what is sampled. concept: the row's first caption, which rows of the same thing share. seed: of its picture."""

    row: int
    caption: str
    concept: str
    seed: int


def choose_questions(source: CaptionedImages, num_captions: int | None, seed: int, first_caption: bool) -> list[Question]:
    """A seeded sample of rows (all for None) in an order of its own, each with one of its captions at random, or its first.

    The order matters where only the first are shown or drawn several times: neighbours in the data are often alike. Picture k
    of the sample is drawn with seed + k, so that a caption that comes twice gets two pictures. UserError for more captions
    than rows.
    """
    rows = choose_rows(len(source), num_captions, seed, "--num-captions")
    random.Random(f"{seed} questions").shuffle(rows)
    questions = []
    for place, row in enumerate(rows):
        captions = source.captions(row)
        caption = captions[0] if first_caption else item_random(seed, ItemId(0, row), "evaluation").choice(captions)
        questions.append(Question(row, caption, captions[0], seed + place))
    return questions
