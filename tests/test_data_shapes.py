"""The synthetic set: captions true of the picture, exact descriptions, a held-out split without leaks."""

from __future__ import annotations

import random
import re

import numpy as np
import pyarrow.parquet as pq
import pytest

from tokenloom_common.errors import UserError
from training.data.builders.scenes import (
    COLORS,
    COMBINATIONS,
    SHAPES,
    Scene,
    Thing,
    describe,
    draw_scene,
    layout_grid,
    make_scene,
)
from training.data.builders.shapes import build_shapes, choose_unseen
from training.data.sources.open_dataset import open_dataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` caches out of the user's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def scenes(count: int = 300, max_objects: int = 4) -> list[Scene]:
    return [make_scene(random.Random(seed), COMBINATIONS, max_objects) for seed in range(count)]


@pytest.mark.long
def test_relations_in_captions_are_true_of_the_positions():
    kinds = set()
    for scene in scenes():
        if scene.relation:
            a, b = scene.things
            true = {"above": a.y < b.y, "below": a.y > b.y, "left of": a.x < b.x, "right of": a.x > b.x}
            assert true[scene.relation], scene
            along, across = abs(a.y - b.y), abs(a.x - b.x)
            assert max(along, across) > 1.5 * min(along, across)  # no second relation is nearly as true
            kinds.add(scene.relation)
    assert kinds == {"above", "below", "left of", "right of"}


def test_things_lie_on_the_canvas_and_apart():
    for scene in scenes():
        for thing in scene.things:
            half = thing.size / 2
            assert half <= min(thing.x, thing.y) and max(thing.x, thing.y) <= 1 - half
        for number, a in enumerate(scene.things):
            for b in scene.things[:number]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > (a.size + b.size) / 2 * 0.85


def test_captions_of_known_scenes():
    red, blue = Thing("circle", "red", 0.5, 0.3, 0.3), Thing("square", "blue", 0.5, 0.7, 0.3)
    assert describe(Scene((red, blue), "above"))[:2] == ["a red circle above a blue square",
                                                         "a blue square below a red circle"]
    assert describe(Scene((Thing("cross", "orange", 0.5, 0.5, 0.6),)))[:3] == [
        "an orange cross", "one orange cross", "a large orange cross"]
    cross = Thing("cross", "green", 0.3, 0.3, 0.3)
    assert describe(Scene((cross, cross, cross)))[:2] == ["three green crosses", "3 green crosses"]


def test_every_caption_names_colors_and_shapes_that_are_there():
    for scene in scenes():
        there = {word for thing in scene.things for word in (thing.color, thing.shape)}
        for caption in describe(scene):
            words = set(re.findall(r"[a-z]+", caption.replace("crosses", "cross")))
            named = {word.removesuffix("s") if word != "cross" else word for word in words}
            assert named & (set(COLORS) | set(SHAPES)) == there, caption


def test_pixels_have_the_colour_at_the_centre_and_smooth_edges():
    scene = Scene((Thing("circle", "red", 0.25, 0.5, 0.4), Thing("square", "blue", 0.75, 0.5, 0.4)), "left of")
    pixels = draw_scene(scene, 32)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    assert pixels[16, 8].tolist() == list(COLORS["red"]) and pixels[16, 24].tolist() == list(COLORS["blue"])
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 4  # anti-aliased


def test_layout_grid_names_what_covers_each_cell():
    scene = Scene((Thing("circle", "red", 0.25, 0.25, 0.3), Thing("cross", "black", 0.75, 0.75, 0.3)))
    grid = np.array(layout_grid(scene)).reshape(16, 16)
    assert grid[4, 4] == 1 + COMBINATIONS.index(("red", "circle")) == 1
    assert grid[12, 12] == 1 + COMBINATIONS.index(("black", "cross")) == 42
    assert grid[4, 12] == grid[0, 0] == 0 and set(np.unique(grid)) == {0, 1, 42}


def test_unseen_combinations_share_no_color_and_no_shape():
    for seed in range(30):
        unseen = choose_unseen(seed)
        assert len({color for color, _ in unseen}) == len({shape for _, shape in unseen}) == len(unseen) == 4


def test_build_holds_out_combinations_and_reads_back(tmp_path):
    report = build_shapes(tmp_path / "s", size=24, num_scenes=200, max_objects=3)
    assert report["pairs"] == {"train": 180, "unseen_combination": 20}
    unseen = {tuple(words.split()) for words in report["unseen_combinations"]}
    rows = {name: pq.read_table(tmp_path / "s" / "data" / f"{name}-00000-of-00001.parquet").to_pylist()
            for name in report["pairs"]}
    for row in rows["train"]:
        assert not {(thing["color"], thing["shape"]) for thing in row["objects"]} & unseen
    for row in rows["unseen_combination"]:
        assert {(thing["color"], thing["shape"]) for thing in row["objects"]} & unseen
    every = rows["train"] + rows["unseen_combination"]
    assert len({row["image"]["bytes"] for row in every}) == 200
    assert {row["count"] for row in every} == {1, 2, 3} and all(len(row["layout"]) == 256 for row in every)
    assert all(row["count"] == len(row["objects"]) and row["caption"] == row["captions"][0] for row in every)
    data = open_dataset(tmp_path / "s", split="unseen_combination")
    assert data[3].image.size == (24, 24) and data.metadata(3)["objects"] == rows["unseen_combination"][3]["objects"]
    assert "unseen_combination" in (tmp_path / "s" / "README.md").read_text()


def test_no_picture_occurs_twice_and_too_many_are_refused(tmp_path, monkeypatch):
    def coarse(generator, allowed, max_objects, required=None):
        color, shape = generator.choice(required or allowed)
        return Scene((Thing(shape, color, 0.5, 0.5, 0.5),))

    monkeypatch.setattr("training.data.builders.shapes.make_scene", coarse)
    build_shapes(tmp_path / "s", num_scenes=36)
    rows = pq.read_table(tmp_path / "s" / "data" / "train-00000-of-00001.parquet").to_pylist()
    assert len({row["image"]["bytes"] for row in rows}) == len(rows) == 32
    with pytest.raises(UserError, match="num_scenes 80: more than there are different pictures"):
        build_shapes(tmp_path / "t", num_scenes=80)
    assert not (tmp_path / "t").exists()


def test_build_depends_on_the_seed_alone_and_is_reused(tmp_path):
    def content(name: str) -> bytes:
        return (tmp_path / name / "data" / "train-00000-of-00001.parquet").read_bytes()

    build_shapes(tmp_path / "a", num_scenes=40)
    assert build_shapes(tmp_path / "a", num_scenes=40)["reused"]
    build_shapes(tmp_path / "b", num_scenes=40)
    build_shapes(tmp_path / "c", num_scenes=40, seed=1)
    assert content("a") == content("b") != content("c")


@pytest.mark.parametrize("options, message", [
    ({"size": 8}, "size 8: must lie in 16 to 512"), ({"num_scenes": 3}, "num_scenes 3"),
    ({"max_objects": 5}, "max_objects 5: must lie in 1 to 4"), ({"max_objects": 0}, "max_objects 0")])
def test_wrong_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        build_shapes(tmp_path / "s", **options)


def test_folder_of_another_builder_is_not_replaced(tmp_path):
    build_shapes(tmp_path / "s", num_scenes=10)
    record = tmp_path / "s" / "build.json"
    record.write_text(record.read_text().replace('"shapes"', '"emoji"'))
    with pytest.raises(UserError, match="not an earlier build of `tokenloom data shapes` alone"):
        build_shapes(tmp_path / "s", num_scenes=20)
