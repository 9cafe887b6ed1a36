"""Encoding pictures: views, restart after a stop, damage to what an earlier run left."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from tests import tiny
from tests.bad_images import encode as encode_image
from tests.bad_images import photo
from tests.encoded_data import ROWS, encode, make_data
from tests.source_files import (
    as_bytes,
    own_cache,  # noqa: F401 (a fixture for all tests here)
    write_parquet,
)
from tokenizer_image import load_tokenizer
from tokenizer_image.images import image_to_pixels, pixels_to_float
from tokenloom_common.config import merge
from tokenloom_common.errors import DataError, ResumeError, RunFailedError, UserError
from training import encode_dataset
from training.config.encoding import EncodeRunConfig, ViewsConfig
from training.config.run import PicturesConfig
from training.data.origin import data_origin
from training.data.sources.drops import BadItem, DropCounter
from training.data.sources.open_dataset import open_dataset
from training.data.tokens import shard_encoder
from training.data.tokens.encoding_progress import prepare_folder
from training.data.tokens.shard_encoder import RowViewsDataset
from training.data.tokens.shards import TokenShards
from training.data.tokens.views import image_views, view_names
from training.data.visits.images import ImageVisits
from training.data.visits.order import DataOrder
from training.encode_dataset import DatasetEncoder
from training.engine.processes import Processes
from training.loop.drops import PictureDrops


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("made"))


def content(shards: TokenShards) -> list[tuple]:
    return [(shards.key(row), shards.captions(row), shards.image_tokens(row).tolist()) for row in range(len(shards))]


def test_shards_hold_the_tokens_of_every_usable_picture(made, tmp_path, group):
    shards = encode(made, tmp_path / "tokens", group)
    source = open_dataset(made / "data", split="train")
    usable = [row for row in range(ROWS) if row != 7]
    assert [shards.key(row) for row in range(len(shards))] == [source.key(row) for row in usable]
    tokenizer = load_tokenizer(made / "tokenizer")
    pixels = numpy.stack([image_to_pixels(source[row].image, 16) for row in usable])
    expected = tokenizer.encode(pixels_to_float(pixels)).flatten(1).tolist()
    assert [shards.image_tokens(row).tolist() for row in range(20)] == expected
    assert shards.captions(10) == source.captions(11)
    files = shards.index.splits["train"].files
    assert [file.rows for file in files] == [6, 5, 6, 3]
    assert shards.index.dropped == {"not an image": 1}
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == [
        "README.md", "tokens.json", *(file.name for file in files)]
    assert data_origin(str(tmp_path / "tokens")).name == "data"
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]  # neither a folder aside nor a lock


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_batches_change_nothing(workers, made, tmp_path, group):
    one = content(encode(made, tmp_path / "a", group))
    assert content(encode(made, tmp_path / "b", group, workers=workers, batch_size=5, shard_rows=100)) == one


class Stopped(Exception):
    """Stands for a kill."""


def stop_after(shards: int, monkeypatch) -> list[str]:
    """Let so many shards be written and end then -> the names of those that are written, as they come."""
    wrote: list[str] = []
    write = shard_encoder.write_shard

    def counted(path: Path, *rest: Any) -> Any:
        if len(wrote) == shards:
            raise Stopped
        wrote.append(path.name)
        return write(path, *rest)

    monkeypatch.setattr(shard_encoder, "write_shard", counted)
    return wrote


def stopped(made: Path, out: Path, group: Processes, monkeypatch, **changes: Any) -> None:
    """A run that ended after two shards."""
    with monkeypatch.context() as patch:
        wrote = stop_after(2, patch)
        with pytest.raises(Stopped):
            encode(made, out, group, **changes)
    assert len(wrote) == 2
    assert not out.exists()


def test_a_stopped_run_goes_on_after_its_last_whole_shard(made, tmp_path, group, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "training")
    whole = content(encode(made, tmp_path / "whole", group))
    stopped(made, tmp_path / "tokens", group, monkeypatch)
    wrote = stop_after(99, monkeypatch)
    shards = encode(made, tmp_path / "tokens", group)
    assert wrote == ["train-00002-of-00004.arrow", "train-00003-of-00004.arrow"]
    assert content(shards) == whole
    assert shards.index == TokenShards(tmp_path / "whole", "train").index  # hashes, and what the first run passed over
    assert "going on with what an earlier run encoded" in caplog.text


@pytest.mark.parametrize(("damage", "again"), [
    (lambda aside: (aside / "train-00001-of-00004.arrow").unlink(), [1, 2, 3]),
    (lambda aside: (aside / "train-00000-of-00004.arrow").write_bytes(b"ARROW"), [0, 2, 3]),
    (lambda aside: (aside / "train-00001-of-00004.json").write_text('{"fi'), [1, 2, 3]),
    (lambda aside: (aside / "train-00001-of-00004.json").unlink(), [1, 2, 3]),
    (lambda aside: (aside / ".train-00002-of-00004.arrow.tmp").write_bytes(b"half"), [2, 3]),
    (lambda aside: (aside / "plan.json").write_text("{"), [0, 1, 2, 3]),
    (lambda aside: (aside / "plan.json").unlink(), [0, 1, 2, 3])])
def test_what_is_damaged_of_an_earlier_run_is_encoded_again(damage, again, made, tmp_path, group, monkeypatch):
    stopped(made, tmp_path / "tokens", group, monkeypatch)
    damage(tmp_path / ".tokens.tmp")
    wrote = stop_after(99, monkeypatch)
    shards = encode(made, tmp_path / "tokens", group)
    assert wrote == [f"train-0000{number}-of-00004.arrow" for number in again]
    assert len(shards) == 20
    assert not list((tmp_path / "tokens").glob(".*"))


@pytest.mark.parametrize(("changes", "words"), [
    ({"views": {"flip": True}}, "views.flip False then, True now"), ({"shard_rows": 7}, "shard_rows asked for 6 then, 7 now"),
    ({"layout": {"kind": "colors", "grid": [2, 2]}}, "layout.kind none then, colors now")])
def test_what_was_encoded_with_other_settings_is_not_thrown_away(changes, words, made, tmp_path, group, monkeypatch):
    stopped(made, tmp_path / "tokens", group, monkeypatch)
    with pytest.raises(ResumeError, match=rf"holds 2 shards .*{words}.*delete that folder to start over") as caught:
        encode(made, tmp_path / "tokens", group, **changes)
    assert caught.value.exit_code == 3
    wrote = stop_after(99, monkeypatch)
    encode(made, tmp_path / "tokens", group, data={"max_bad_fraction": 0.5})  # changes no token
    assert len(wrote) == 2


def test_changed_data_is_noticed(made, tmp_path, group, monkeypatch):
    shutil.copytree(made / "data", tmp_path / "data")
    data = {"path": str(tmp_path / "data")}
    stopped(made, tmp_path / "tokens", group, monkeypatch, data=data)
    (tmp_path / "data/train/12.txt").write_text("another caption")
    with pytest.raises(ResumeError, match=r"rows\.train"):
        encode(made, tmp_path / "tokens", group, data=data)
    shutil.copy(made / "data/train/12.txt", tmp_path / "data/train/12.txt")
    tiny.pictures(1, side=22)[0].save(tmp_path / "data/train/12.png")
    with pytest.raises(ResumeError, match=r"rows\.train"):
        encode(made, tmp_path / "tokens", group, data=data)


def test_a_kill_while_it_publishes_loses_nothing(made, tmp_path, group, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(encode_dataset, "publish_folder", lambda aside, out: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            encode(made, tmp_path / "tokens", group)
    wrote = stop_after(99, monkeypatch)
    assert len(encode(made, tmp_path / "tokens", group)) == 20
    assert wrote == []
    with monkeypatch.context() as patch:
        patch.setattr(encode_dataset, "remove_records", lambda out: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            encode(made, tmp_path / "tokens", group)
    assert len(TokenShards(tmp_path / "tokens", "train")) == 20
    encode(made, tmp_path / "tokens", group)  # whose folder still has the notes
    assert not (tmp_path / "tokens/plan.json").exists()


def test_two_runs_do_not_encode_into_one_folder(made, tmp_path, group, monkeypatch):
    write = shard_encoder.write_shard

    def other_run(*rest):
        with pytest.raises(UserError, match="another run is encoding into it"):
            encode(made, tmp_path / "tokens", group)
        return write(*rest)

    monkeypatch.setattr(shard_encoder, "write_shard", other_run)
    assert len(encode(made, tmp_path / "tokens", group)) == 20


def test_a_shard_that_somebody_changed_is_not_published(made, tmp_path, group, monkeypatch):
    mark = shard_encoder.mark_done

    def changed(aside, shard, done):
        mark(aside, shard, done)
        (aside / shard.name).write_bytes(b"other")

    monkeypatch.setattr(shard_encoder, "mark_done", changed)
    with pytest.raises(RunFailedError, match=r"00000-of-00004\.arrow: changed after it was written"):
        encode(made, tmp_path / "tokens", group)
    assert not (tmp_path / "tokens").exists()


def test_a_full_disk_is_said_and_the_other_processes_stop(made, tmp_path, group, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_encoder, "write_shard", full)
        with pytest.raises(RunFailedError, match=r"no space left .*start the same command again"):
            encode(made, tmp_path / "tokens", group)
    assert (tmp_path / ".tokens.tmp/.failed-0").exists()
    assert len(encode(made, tmp_path / "tokens", group)) == 20  # the mark is of the run before
    reads = []
    read = RowViewsDataset.__getitem__

    def failing_elsewhere(self, row):
        reads.append(row)
        (tmp_path / ".tokens.tmp/.failed-1").touch()
        return read(self, row)

    monkeypatch.setattr(RowViewsDataset, "__getitem__", failing_elsewhere)
    with pytest.raises(KeyError):  # alone, there is nobody to say what happened
        encode(made, tmp_path / "tokens", group)
    assert len(reads) == 4  # a batch


@pytest.mark.parametrize(("changes", "words"), [
    ({"out": "/"}, "give the path of a folder of its own"), ({"out": "."}, "give the path of a folder of its own"),
    ({"splits": []}, "splits")])
def test_a_folder_or_splits_that_cannot_be_are_one_line(changes, words, made, group):
    base = {"image_tokenizer": str(made / "tokenizer"), "data": {"path": str(made / "data")}, "out": "o"}
    with pytest.raises(UserError, match=words):
        DatasetEncoder(EncodeRunConfig.parse(merge(base, changes), "test"), group)


def test_every_process_knows_how_many_rows_there_are(made):
    """A process that only knew its own bad ones would end at the eleventh, however large the data."""
    source = open_dataset(made / "data", split="train")
    source.bad_items.append(BadItem("x", "no caption"))
    counters = [DropCounter("d", 0.9) for _ in range(2)]
    for counter, first in zip(counters, (True, False), strict=True):
        counter.record_opened(source, first)
        for _ in range(12):
            counter.record("truncated", "y", seen_before=True)
    assert [counter.seen for counter in counters] == [ROWS + 1] * 2
    assert [counter.dropped for counter in counters] == [13, 12]


def test_another_number_of_processes_keeps_to_the_shards_of_the_first_run(tmp_path):
    assert prepare_folder(tmp_path / "aside", {"rows": [21], "shard_rows": 6}) == 6
    (tmp_path / "aside/train-00000-of-00004.json").write_text("{}")
    assert prepare_folder(tmp_path / "aside", {"rows": [21], "shard_rows": 11}) == 6
    assert len(list((tmp_path / "aside").iterdir())) == 2
    with pytest.raises(ResumeError, match=r"rows \[21\] then, \[22\] now"):
        prepare_folder(tmp_path / "aside", {"rows": [22], "shard_rows": 11})


def test_views_are_the_corners_and_mirrors_of_a_picture():
    ramp = numpy.zeros((40, 60, 3), numpy.uint8)
    ramp[..., 0] = numpy.arange(60) * 4
    ramp[..., 1] = numpy.arange(40)[:, None] * 6
    config = ViewsConfig(flip=True, corners=True, enlarged=1.25)
    names, views = view_names(config), image_views(Image.fromarray(ramp), 32, config)
    assert names[:5] == ["plain", "top-left", "top-right", "bottom-left", "bottom-right"]
    assert names[5:] == [f"{name} mirrored" for name in names[:5]]
    assert views.shape == (10, 32, 32, 3)
    assert (views[0] == image_to_pixels(Image.fromarray(ramp), 32)).all()
    assert (views[5:] == views[:5, :, ::-1]).all()
    # the square is columns 10 to 50; a corner's cut is 32 wide, so its pixels are the picture's own
    for number, (top, left) in enumerate(((0, 10), (0, 18), (8, 10), (8, 18)), 1):
        assert (views[number] == ramp[top:top + 32, left:left + 32]).all()
    assert len(image_views(Image.fromarray(ramp), 32, ViewsConfig())) == 1 == len(view_names(ViewsConfig()))


def test_several_encodings_are_kept_and_the_first_is_the_plain_one(made, tmp_path, group):
    plain = encode(made, tmp_path / "plain", group, layout={"kind": "colors", "grid": [2, 2]})
    shards = encode(made, tmp_path / "tokens", group, views={"flip": True, "corners": True},
                    layout={"kind": "colors", "grid": [2, 2]})
    assert shards.index.views == view_names(ViewsConfig(flip=True, corners=True))
    assert content(shards) == content(plain)
    source, tokenizer = open_dataset(made / "data", split="train"), load_tokenizer(made / "tokenizer")
    views = image_views(source[3].image, 16, ViewsConfig(flip=True, corners=True))
    expected = tokenizer.encode(pixels_to_float(views)).flatten(1).tolist()
    assert [shards.image_tokens(3, view).tolist() for view in range(10)] == expected
    grids = [shards.layout(3, view).reshape(2, 2).tolist() for view in range(10)]
    assert grids[0] == plain.layout(3).reshape(2, 2).tolist()
    assert grids[5] == [row[::-1] for row in grids[0]]


def test_views_that_cannot_be_are_refused(made):
    for changes, words in (({"views": {"corners": True}, "layout": {"kind": "classes", "classes": 3}}, "views.corners shows"),
                           ({"views": {"enlarged": 1.5}}, "views.enlarged is for views.corners"),
                           ({"views": {"corners": True, "enlarged": 1.0}}, "greater than 1")):
        with pytest.raises(UserError, match=words):
            EncodeRunConfig.parse(merge({"image_tokenizer": "t", "data": {"path": "d"}, "out": "o"}, changes), "test")


def test_too_many_unusable_pictures_end_the_run_and_a_new_start_meets_them_again(made, tmp_path, group):
    for row in range(ROWS):
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        (folder / f"{row:02d}.png").write_bytes(b"" if row % 2 else (made / "data/train/01.png").read_bytes())
        (folder / f"{row:02d}.txt").write_text("x")
    (folder / "extra.png").write_bytes(b"")
    (folder / "extra.txt").write_text("x")
    for _ in range(2):
        with pytest.raises(DataError, match=r"dropped 11 of 22 .*max_bad_fraction"):
            encode(made, tmp_path / "tokens", group, data={"path": str(folder)})


@pytest.mark.parametrize("streaming", [False, True])
def test_failed_downloads_are_left_out_and_said_on_a_line_of_their_own(made, tmp_path, group, caplog, streaming):
    picture = as_bytes((made / "data/train/01.png").read_bytes())
    failed = [row % 2 == 0 for row in range(60)]
    write_parquet(tmp_path / "d" / "00000.parquet", [None if bad else picture for bad in failed], ["x"] * 60,
                  status=["failed_to_download" if bad else "success" for bad in failed])
    caplog.set_level(logging.INFO)
    for _ in range(2):  # the second time from the records of the first
        shards = encode(made, tmp_path / "tokens", group, data={"path": str(tmp_path / "d"), "streaming": streaming})
        assert len(shards) == 30 and shards.index.dropped == {}
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if line.endswith("left out: 30 downloads failed")]) == 2
    assert not [line for line in lines if "unusable" in line]


def test_a_run_leaves_failed_downloads_out_of_its_count(tmp_path, group, caplog):
    write_parquet(tmp_path / "0.parquet", [None] * 30 + [as_bytes(encode_image(photo(), "PNG"))], ["x"] * 31,
                  status=["failed"] * 31)
    caplog.set_level(logging.INFO)
    for rows in (0, 1):
        source = open_dataset(tmp_path, streamed_rows=rows)
        drops = PictureDrops(PicturesConfig(path=str(tmp_path)), source, group)
        visit = ImageVisits(source, 8, 0, 0.0)[DataOrder(len(source), 0).items(0, 1)[0]._replace(index=0)]
        drops.count(visit.dropped)
        drops.say()
        assert len(visit.dropped) == (30 if rows else 0)
        assert (drops.problem, drops.total()) == (None, 0)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: left out: 30 downloads failed", "left out: 30 downloads failed"]


def test_a_disk_without_room_for_the_tokens_is_refused_before_they_are_made(made, tmp_path, group, monkeypatch):
    tokens = encode(made, tmp_path / "first", group).image_tokens(0)
    need = ROWS * tokens.size * 2  # bytes of uint16
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(need, 0, need - 1))
    monkeypatch.setattr(shard_encoder.ShardEncoder, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(UserError, match=r"^--out .*: not enough room: at least "):
        encode(made, tmp_path / "tokens", group)
    assert not (tmp_path / "tokens").exists()
