"""Which pictures are measured, and the saved statistics that they are measured against."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from tests.evaluation_images import SIDE, TINY_FEATURES, gaussian, tiny_extractor, tokenizer
from tokenizer_image.images import image_to_pixels
from tokenloom_common.errors import UserError
from training.evaluation.image_metrics.frechet import CROP, RESIZE, preparation
from training.evaluation.image_metrics.reference import (
    ReferenceStatistics,
    check_reference,
    load_reference,
    save_reference,
)
from training.evaluation.reconstruction import choose_rows

# ---- which pictures ----

def test_a_sample_is_seeded_without_replacement_and_in_order():
    assert choose_rows(5, None, 3) == [0, 1, 2, 3, 4] == choose_rows(5, 5, 9)
    chosen = choose_rows(1000, 100, 0)
    assert chosen == sorted(set(chosen)) == choose_rows(1000, 100, 0)
    assert len(chosen) == 100
    assert chosen != choose_rows(1000, 100, 1)
    for wrong in (0, -1, 6):
        with pytest.raises(UserError, match=f"--num-images {wrong}: give 1 to 5"):
            choose_rows(5, wrong, 0)


def test_the_report_names_the_resize_and_crop_that_are_used():
    picture = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=numpy.uint8))
    assert (RESIZE, CROP) == ("lanczos (Pillow, antialiased)", "centre square")
    expected = numpy.asarray(picture.crop((20, 0, 70, 50)).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    # Pillow's filter sees beyond the square, so up to three columns at each side differ from those of a picture cut before
    assert (image_to_pixels(picture, SIDE)[:, 3:-3] == expected[:, 3:-3]).all()


# ---- reference statistics ----

class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil-was-here"),))


def statistics(**changes) -> ReferenceStatistics:
    mean, covariance = gaussian(0, TINY_FEATURES)
    values = {"mean": mean, "covariance": covariance, "count": 20, "preparation": preparation(tokenizer(), tiny_extractor()),
              "fingerprint": "f" * 32}
    return ReferenceStatistics(**{**values, **changes})


def test_a_reference_comes_back_as_it_was(tmp_path):
    save_reference(tmp_path / "new" / "r.npz", statistics())
    back = load_reference(tmp_path / "new" / "r.npz")
    assert torch.equal(back.mean, statistics().mean)
    assert torch.equal(back.covariance, statistics().covariance)
    assert (back.count, back.preparation, back.fingerprint) == (20, statistics().preparation, "f" * 32)
    check_reference(back, statistics().preparation, TINY_FEATURES, tmp_path / "r.npz")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.npz"]


def test_a_reference_in_float32_is_refused(tmp_path):
    save_reference(tmp_path / "r.npz", statistics(mean=statistics().mean.float(), covariance=statistics().covariance.float()))
    with pytest.raises(UserError, match="arrays not in float64"):
        load_reference(tmp_path / "r.npz")


def test_a_reference_of_another_preparation_is_refused_by_name(tmp_path):
    path = tmp_path / "r.npz"
    for other, words in ((preparation(tokenizer(), tiny_extractor("other")), "extractor tiny, this evaluation has other"),
                         (preparation(tokenizer(), tiny_extractor(weights_hash="1" * 64)), "weights hash 0000"),
                         (preparation(tokenizer(16), tiny_extractor()), "resolution 32, this evaluation has 16")):
        with pytest.raises(UserError, match=words):
            check_reference(statistics(), other, TINY_FEATURES, path)
    with pytest.raises(UserError, match="of 12 features, expected 13"):
        check_reference(statistics(), statistics().preparation, 13, path)


def test_a_damaged_edited_or_pickled_reference_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_reference(tmp_path / "good.npz", statistics())
    whole = (tmp_path / "good.npz").read_bytes()
    arrays = dict(numpy.load(tmp_path / "good.npz"))

    def written(**changes) -> bytes:
        stream = io.BytesIO()
        numpy.savez(stream, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
        return stream.getvalue()

    header = json.loads(str(arrays["header"]))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    wrong = {"cut": whole[:-50], "empty": b"", "text": b"hello " * 50, "flipped": bytes(flipped),
             "mean": written(mean=arrays["mean"] + 1), "count": written(count=numpy.int64(21)), "less": written(count=None),
             "more": written(extra=numpy.zeros(1)), "shape": written(covariance=numpy.zeros((3, 3))),
             "header": written(header=numpy.array(json.dumps(header | {"fingerprint": "a" * 32}))),
             "format": written(header=numpy.array(json.dumps(header | {"format": "other"}))),
             "no json": written(header=numpy.array("nothing")),
             "objects": written(mean=numpy.array([Evil()], dtype=object)), "pickle": pickle.dumps(Evil())}
    for name, data in wrong.items():
        (tmp_path / "bad.npz").write_bytes(data)
        with pytest.raises(UserError, match="not a whole file of reference statistics") as caught:
            load_reference(tmp_path / "bad.npz")
        assert "\n" not in str(caught.value), name
    assert not (tmp_path / "evil-was-here").exists()
