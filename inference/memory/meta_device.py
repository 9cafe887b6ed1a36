"""Count the memory of models before it is allocated, on torch's meta device.

Tensors there have shapes, but no numbers.
"""

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
from tokenloom_common.pretrained import SkipParameterInit


def build_on_meta(kind: Callable[[Any], Any], config: StrictConfig) -> Any:
    """Build the model of a config on the meta device.

    UserError for one that no machine could hold.
    """
    try:
        # random numbers would be drawn there by torch._refs, which imports torch._dynamo
        with torch.device("meta"), SkipParameterInit():
            return kind(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError("no model can be built from this config "
                        f"({one_line(error)[:120]})") from None


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Let code that turns autocast off run on the meta device, unknown to torch.autocast."""
    original = torch.autocast.__init__

    def start(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        known = "cpu" if device_type == "meta" else device_type
        original(self, known, *args, **kwargs)

    torch.autocast.__init__ = start  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__init__ = original  # type: ignore[method-assign]


def peak_on_meta(run: Callable[[], object], model: nn.Module) -> int:
    """Return the peak bytes that `run` allocates on the meta device, beside the model's own."""
    with torch.no_grad(), fused_attention(), Alive(model) as alive:
        run()
    return alive.peak


@contextmanager
def fused_attention(with_dropout: bool = False) -> Iterator[None]:
    """Run attention on the meta device as a fused kernel, without materialising its scores.

    CPU and CUDA have such kernels for heads that are contiguous in memory; the meta device has
    none, and would always allocate the scores.
    with_dropout: also with dropout of attention weights, which only CUDA's kernels have.
    """
    original = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
               dropout_p: float = 0.0, **options: Any) -> Tensor:
        contiguous = all(part.is_meta and part.stride(-1) == 1 for part in (query, key, value))
        if contiguous and (with_dropout or not dropout_p):
            return _Fused.apply(query, key, value, attn_mask)
        return original(query, key, value, attn_mask, dropout_p, **options)

    # not a torch function mode, which would not reach what a backward pass recomputes
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class _Fused(torch.autograd.Function):
    """The memory of a fused kernel: it keeps inputs, output, a float32 sum per row, and the mask
    in the queries' type."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor,
                mask: Tensor | None) -> Tensor:
        """query [B, H, n, d], key and value [B, G, m, d] -> [B, H, n, d]."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        if any(context.needs_input_grad):
            kept = [query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32)]
            if mask is not None:
                kept.append(mask.new_empty(mask.shape, dtype=query.dtype))
            context.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return a gradient for each of query, key and value."""
        return *(part.new_empty(part.shape) for part in context.saved_tensors[:3]), None


class Alive(TorchDispatchMode):
    """Count the bytes of tensors that operations allocate on the model's device and have not
    freed: `now` and `peak`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = next(model.parameters()).device
        # by storage, since a view of a weight is no new memory; the model's storages stay alive, so
        # that no new one gets the address of an old one
        own = (*model.parameters(), *model.buffers())
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in own}

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

    def _free(self, address: int) -> None:
        self.now -= self._known.pop(address)
