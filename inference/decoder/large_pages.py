"""Memory of large pages for what every step reads whole: on the CPU a step's time is reading weights, and with pages of 2 MiB
instead of 4 KiB the processor looks up fewer addresses on the way (8 to 20 % faster reading measured on a virtual machine).

Linux gives such pages on request (madvise) where it can; elsewhere, or where it will not, memory is as always.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

PAGE = 2 * 1024 * 1024
CHUNK = 16 * PAGE
LEAST = 256 * 1024  # bytes; smaller tensors stay where they are
ALIGNMENT = 64


class LargePages:
    """Hands out memory from chunks of large pages; a chunk lives as long as a tensor in it."""

    def __init__(self) -> None:
        self._chunk: Tensor | None = None  # uint8
        self._used = 0

    def moved(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a CPU tensor in large pages; the tensor itself where it is small, or there are none."""
        if tensor.device.type != "cpu" or tensor.nbytes < LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
            return tensor
        memory = self._take(tensor.nbytes)
        return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def _take(self, count: int) -> Tensor:
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if self._chunk is None or start + count > len(self._chunk):
            self._chunk, start = _mapped(max(CHUNK, -(-count // PAGE) * PAGE)), 0
        self._used = start + count
        return self._chunk[start: self._used]


def _mapped(count: int) -> Tensor:
    """`count` bytes that begin at a large page."""
    area = mmap.mmap(-1, count + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    first = -whole.data_ptr() % PAGE
    return whole[first: first + count]
