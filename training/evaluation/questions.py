"""Captions to sample: rows of a split, a caption of each, and the concept its image should show."""

from __future__ import annotations

import random
from typing import NamedTuple

from training.data.sources.captioned_images import CaptionedImages
from training.data.visits.order import ItemId, item_random
from training.evaluation.reconstruction import choose_rows


class Question(NamedTuple):
    """A caption to sample and to check its image against.

    concept: the row's first caption, which rows of the same thing share. seed: of its image.
    """

    row: int
    caption: str
    concept: str
    seed: int


def choose_questions(source: CaptionedImages, num_captions: int | None, seed: int,
                     first_caption: bool) -> list[Question]:
    """Draw rows (all for None) in a shuffled order, each with a random or its first caption.

    Image k of the sample is drawn with seed + k, so that a caption that comes twice gets two
    images. UserError for more captions than rows.
    """
    rows = choose_rows(len(source), num_captions, seed, "--num-captions")
    # neighbours in the data are often alike, and only the first few are shown or sampled again;
    # seeded with text, so that no two uses of one seed give the same numbers
    random.Random(f"{seed} questions").shuffle(rows)
    questions = []
    for place, row in enumerate(rows):
        captions = source.captions(row)
        caption = captions[0]  # of a class model: the class
        if not first_caption:
            caption = item_random(seed, ItemId(0, row), "evaluation").choice(captions)
        questions.append(Question(row, caption, captions[0], seed + place))
    return questions
