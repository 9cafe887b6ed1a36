"""Models on torch's meta device, where tensors have shapes and no numbers: what a model takes is counted before it is made."""

# Axes: B batch, H heads, G key/value heads, n slots, d head width

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import UserError, one_line


def build_on_meta(kind: Callable[[Any], Any], config: StrictConfig) -> Any:
    """The model of a config on the meta device. UserError for one that no machine could hold."""
    try:
        with torch.device("meta"):
            return kind(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"no model can be built from this config ({one_line(error)[:120]})") from None


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Let code that turns autocast off for its tensor's device run on the meta device, which torch.autocast does not know."""
    original = torch.autocast.__init__

    def start(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast.__init__ = start  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = original  # type: ignore[method-assign]


def peak_on_meta(run: Callable[[], object], model: nn.Module) -> int:
    """Most bytes alive at once of the tensors that `run` makes on the meta device, the model's own left out."""
    with torch.no_grad(), fused_attention(), Alive(model) as alive:
        run()
    return alive.peak


@contextmanager
def fused_attention(with_dropout: bool = False) -> Iterator[None]:
    """Attention on the meta device that keeps its scores to itself, as the kernels of CPU and CUDA do where a head's numbers
    lie side by side; the meta device has none of them and would make the scores always.

    with_dropout: also where attention weights are dropped, which CUDA's kernels do and the CPU's does not.
    """
    original = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               **options: Any) -> Tensor:
        fused = all(part.is_meta and part.stride(-1) == 1 for part in (query, key, value)) and (with_dropout or not dropout_p)
        if fused:
            return _Fused.apply(query, key, value, attn_mask)
        return original(query, key, value, attn_mask, dropout_p, **options)

    # not a mode of torch's, which would not reach activations that are computed again in a backward pass
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class _Fused(torch.autograd.Function):
    """What a fused kernel takes and keeps: its inputs and output, a float32 sum a row, a mask in the queries' type."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """query [B, H, n, d], key and value [B, G, m, d] -> [B, H, n, d]."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        if any(context.needs_input_grad):
            sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
            added = [] if mask is None else [mask.new_empty(mask.shape, dtype=query.dtype)]
            context.save_for_backward(query, key, value, out, sums, *added)
        return out

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """A gradient for each of query, key and value."""
        return *(part.new_empty(part.shape) for part in context.saved_tensors[:3]), None


class Alive(TorchDispatchMode):
    """Adds up the memory of the tensors that operations make on the model's device, until each is freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = next(model.parameters()).device
        # a view of a weight is no new memory; the tensors stay referenced, so that no new one gets an old one's number
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device == self._device:
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, number: int) -> None:
        self.now -= self._known.pop(number)
