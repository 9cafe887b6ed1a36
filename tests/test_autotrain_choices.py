"""`tokenloom train` chooses by data, machine, speed and minutes: a pure function, without any training."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tokenloom_common.errors import UserError
from training.autotrain.choices import Choices, check_minutes, choose, steps_in
from training.autotrain.facts import DataFacts, MachineFacts, StartFacts
from training.autotrain.shapes import SHAPES, Shape, check_size
from training.autotrain.words import choice_lines, notes_of

EMOJI = DataFacts(images=300, shorter_side=64, held_out=None, held_out_images=0, captions=1800, distinct=1700,
                  words=600, mean_words=5.0, vocabulary=1520, text_ids=18, read_seconds=0.001)
PHOTOS = replace(EMOJI, images=30_000, shorter_side=480, distinct=29_000, words=9000,
                 vocabulary=4096, text_ids=24, read_seconds=0.004)
TWO_CORES = MachineFacts(cores=2, gpus=0, gpu_name=None, processes=2, memory=4 << 30)
ONE_GPU = MachineFacts(cores=16, gpus=1, gpu_name="H200", processes=1, memory=100 << 30)
SHIPPED = StartFacts("shipped", 64, (8, 8), 1024, width=320, psnr=17.0, captions_fit=1.0)
KNOWING = replace(SHIPPED, psnr=23.0)


class Speeds:
    """Speeds in proportion to pixels and tokens, as of two quiet CPU cores; `factor` times as slow."""

    def __init__(self, factor: float = 1.0, fitting: int = 1 << 20, start_seconds: float = 10.0) -> None:
        self.factor, self.fitting, self.start_seconds = factor, fitting, start_seconds
        self.asked: list[Shape] = []

    def picture(self, shape: Shape) -> float:
        self.asked.append(shape)
        return self.factor * 0.0045 * (shape.size / 32) ** 2

    def row(self, shape: Shape, width: int) -> float:
        return self.factor * 0.016 * (shape.tokens / 64) * (width / 320) ** 2

    def fits(self, shape: Shape) -> bool:
        return shape.size <= self.fitting


def chosen(data=EMOJI, machine=TWO_CORES, minutes=20.0, speeds=None, start=None, size=None) -> Choices:
    return choose(data, machine, 60 * minutes, speeds or Speeds(), start, size)


def said(choices: Choices, data=EMOJI, machine=TWO_CORES) -> dict[str, tuple[str, str]]:
    return {line.name: (line.value, line.why) for line in choice_lines(choices, data, machine)}


def notes(choices: Choices, data=EMOJI) -> str:
    return "\n".join(notes_of(choices, data))


def test_the_stages_fill_the_minutes_and_no_more():
    for minutes in (5, 20, 60, 600):
        times = chosen(minutes=minutes).times
        total = times.copy + times.tokenizer + times.encode + times.transformer + times.report + 3 * 10
        assert total == pytest.approx(60 * minutes)


def test_more_minutes_never_make_smaller_pictures():
    data = replace(PHOTOS, images=4000)
    sizes = [chosen(data, minutes=minutes).shape.size for minutes in (2, 10, 30, 120, 600, 6000)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 32 < sizes[-1]


def test_a_slower_machine_gets_smaller_pictures_or_a_smaller_transformer():
    fast, slow = chosen(minutes=60), chosen(minutes=60, speeds=Speeds(6))
    assert (fast.shape.size, fast.width) == (64, 320)
    assert slow.shape.size == 32
    assert chosen(minutes=20, speeds=Speeds(6)).width == 128


def test_pictures_are_never_larger_than_the_data():
    small = replace(PHOTOS, shorter_side=40)
    choices = chosen(small, ONE_GPU, 600, Speeds(0.01))
    assert choices.shape.size == 32
    assert "shorter side 40" in said(choices)["image size"][1]


def test_few_images_get_no_large_pictures():
    few = replace(PHOTOS, images=500)
    choices = chosen(few, ONE_GPU, 600, Speeds(0.001))
    assert choices.shape.size == 64
    assert "500 images" in said(choices)["image size"][1] or "475 images" in said(choices)["image size"][1]
    assert chosen(PHOTOS, ONE_GPU, 600, Speeds(0.001)).shape.size == 256


def test_a_shape_that_does_not_fit_into_memory_is_not_chosen():
    choices = chosen(PHOTOS, ONE_GPU, 600, Speeds(0.001, fitting=64))
    assert choices.shape.size == 64
    assert "memory" in said(choices)["image size"][1]


def test_only_shapes_that_may_be_chosen_are_measured():
    speeds = Speeds(6)
    chosen(minutes=5, speeds=speeds)
    assert {shape.size for shape in speeds.asked} == {32}


def test_a_large_data_set_and_a_fast_machine_get_the_large_transformer():
    choices = chosen(PHOTOS, ONE_GPU, 600, Speeds(0.001))
    assert (choices.width, choices.codebook_size, choices.dropout) == (512, 4096, 0.1)
    assert choices.batch == 64


def test_the_shipped_tokenizer_is_where_small_data_starts():
    choices = chosen(start=SHIPPED)
    assert choices.shape.start == "shipped"
    assert (choices.shape.size, choices.codebook_size) == (64, 1024)
    assert "starts from shipped" in said(choices)["image tokenizer"][0]
    # it takes fewer pictures, so the transformer gets more of the time
    assert choices.times.transformer > chosen().times.transformer


def test_the_shipped_tokenizer_is_not_taken_for_other_sizes_or_large_data():
    assert chosen(start=replace(SHIPPED, size=48, grid=(6, 6))).shape.start is None
    assert chosen(start=SHIPPED, size=32).shape.start is None
    assert chosen(PHOTOS, start=SHIPPED, minutes=600).shape.start is None


def test_a_start_is_taken_where_even_the_smallest_shape_from_scratch_takes_too_long():
    class FastTokenizer(Speeds):
        def picture(self, shape: Shape) -> float:
            return 0.02  # the same for every size, so that only the number of pictures counts

    minutes = (24_000 * 0.02 + 25_000 * 0.016) / 60
    assert chosen(minutes=minutes, speeds=FastTokenizer()).shape.size == 32
    assert chosen(minutes=minutes, speeds=FastTokenizer(), start=SHIPPED).shape.start == "shipped"


def test_a_start_that_knows_the_data_gives_its_transformer_too():
    choices = chosen(start=KNOWING)
    assert choices.shape.start_width == choices.width == 320
    assert chosen(start=SHIPPED).shape.start_width is None
    assert chosen(start=replace(KNOWING, captions_fit=0.5)).shape.start_width is None
    assert said(choices)["transformer"] == ("starts from shipped, and reads its ids",
                                            "that model's images and words do for this data")
    # its codes are kept, so that most of the time is the transformer's
    assert choices.times.transformer > chosen(start=SHIPPED).times.transformer
    assert (choices.guidance, choices.temperature) == (2.0, 0.5)


def test_a_size_that_the_start_has_keeps_the_start():
    assert chosen(start=SHIPPED, size=64, minutes=120).shape == chosen(start=SHIPPED, minutes=120).shape


def test_the_size_that_the_user_gives_is_taken():
    for size in (32, 64, 128, 256):
        assert chosen(size=size).shape.size == size
    check_size(None)
    with pytest.raises(UserError, match="--size 48"):
        check_size(48)


@pytest.mark.parametrize("minutes", [0, 0.5, -3])
def test_too_few_minutes_are_refused_with_the_reason(minutes):
    with pytest.raises(UserError, match="starting the three programs"):
        check_minutes(minutes)


@pytest.mark.parametrize("minutes", [float("nan"), float("inf"), 100_000])
def test_more_than_sixty_days_are_refused(minutes):
    with pytest.raises(UserError, match=r"give 1 to 86,400$"):
        check_minutes(minutes)


def test_a_short_time_is_said_honestly_and_still_trains():
    choices = chosen(minutes=2)
    assert "the time is short" in notes(choices)
    assert "expect blurry pictures" in notes(choices)
    assert choices.steps >= 20
    assert choices.tokenizer_steps >= 20
    assert notes(chosen(minutes=60)) == ""


@pytest.mark.parametrize("size", [None, 32, 64, 128, 256])
def test_a_time_that_is_enough_is_not_said_to_be_short(size):
    for minutes in range(5, 1500, 5):
        choices = chosen(PHOTOS, minutes=minutes, size=size)
        times, shape = choices.times, choices.shape
        speeds = Speeds()
        needed = shape.pictures * speeds.picture(shape) + shape.rows * speeds.row(shape, 320)
        is_short = "the time is short" in notes(choices, PHOTOS)
        assert is_short is (needed > times.tokenizer + times.transformer) or choices.width != 320


def test_images_are_held_out_unless_the_data_has_a_split_or_is_tiny():
    assert chosen().held_out == 15
    assert chosen(replace(EMOJI, images=60)).held_out == 0
    assert chosen(replace(EMOJI, images=40_000)).held_out == 500
    data = replace(EMOJI, held_out="validation", held_out_images=80)
    own = chosen(data)
    assert (own.held_out, own.images) == (80, 300)
    assert said(own, data)["held out"][0] == "80 images of split validation"


def test_the_best_on_held_out_images_is_kept_where_there_are_enough_to_tell():
    assert not chosen().keeps_best  # learnt by heart
    assert chosen(replace(EMOJI, images=1500)).keeps_best
    assert not chosen(replace(EMOJI, images=1500, held_out="test", held_out_images=3)).keeps_best


def test_what_takes_too_long_to_read_is_read_in_part_and_said():
    slow = replace(PHOTOS, images=1_000_000, read_seconds=0.02)
    choices = chosen(slow, minutes=20)
    assert choices.copied == 9000  # 15 % of the 20 minutes
    value, why = said(choices, slow)["data"]
    assert value == "9,000 images of 1,000,000"
    assert "reading all takes 5.6 hours" in why


def test_reading_never_takes_more_than_its_share_of_the_time():
    slow = replace(EMOJI, images=5000, read_seconds=0.2, held_out="test", held_out_images=2000)
    choices = chosen(slow, minutes=10)
    assert choices.copied == 500
    assert choices.held_out == 45
    assert choices.times.copy < 0.2 * 600


def test_captions_that_are_all_the_same_are_said():
    data = replace(EMOJI, distinct=1)
    assert "all captions are the same" in notes(chosen(data), data)


def test_text_length_and_vocabulary_come_from_the_captions():
    choices = chosen(replace(EMOJI, text_ids=400, vocabulary=640))
    assert (choices.text_length, choices.vocabulary) == (96, 640)
    assert chosen(replace(EMOJI, text_ids=3)).text_length == 8


def test_every_choice_says_why():
    for choices in (chosen(), chosen(PHOTOS, ONE_GPU), chosen(start=SHIPPED), chosen(size=128), chosen(start=KNOWING)):
        lines = said(choices)
        assert all(value and why for value, why in lines.values())
        assert len(lines) == (10 if choices.shape.start_width else 11)


def test_every_shape_divides_its_size():
    assert all(shape.size % shape.patch == 0 for shape in SHAPES)
    assert steps_in(100, 0.5) == 200
    assert steps_in(1, 0.5) == 20
