"""Memory of large pages: the same numbers, chunks that are shared, and none where there is no need."""

from __future__ import annotations

import gc

import pytest
import torch

from inference.decoder import large_pages
from inference.decoder.large_pages import CHUNK, LEAST, PAGE, LargePages


@pytest.mark.long
@pytest.mark.skipif(not hasattr(large_pages.mmap, "MADV_HUGEPAGE"), reason="Linux alone has them")
def test_tensors_share_chunks_that_begin_at_a_page():
    pages = LargePages()
    tensors = [torch.randn(300, 301), torch.randint(-100, 100, (LEAST,), dtype=torch.int8), torch.randn(3, CHUNK // 8)]
    moved = [pages.moved(tensor) for tensor in tensors]
    assert all(torch.equal(a, b) for a, b in zip(tensors, moved, strict=True))
    assert moved[0].data_ptr() % PAGE == 0
    assert 0 < moved[1].data_ptr() - moved[0].data_ptr() < moved[0].nbytes + 64
    assert moved[2].data_ptr() % PAGE == 0  # larger than what was left
    assert all(tensor.data_ptr() % 64 == 0 for tensor in moved)
    kept = moved[1]
    del pages, moved
    gc.collect()
    assert torch.equal(kept, tensors[1])  # the chunk lives as long as one of its tensors


def test_small_tensors_stay_where_they_are():
    small = torch.randn(10, 10)
    assert LargePages().moved(small) is small


def test_a_system_without_them_keeps_its_memory(monkeypatch):
    monkeypatch.setattr(large_pages, "mmap", object())
    large = torch.randn(1000, 1000)
    assert LargePages().moved(large) is large
