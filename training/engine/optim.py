"""AdamW, and Adafactor as Parti used it, with decay on matrices only; and the learning rate as a function of the step."""

# Axes: R rows and M columns of a weight seen as a matrix; a convolution [R, C, kh, kw] is seen as [R, M = C*kh*kw]

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from training.config.optim import OptimConfig

SMALLEST_SQUARE = 1e-30  # eps1 of Shazeer & Stern 2018: added to every squared gradient
SMALLEST_SCALE = 1e-3  # eps2: what a weight of zeros counts as when steps are scaled by the weights


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Weight decay on weights of linear and convolution layers; none on gains, biases, embeddings and positions."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim >= 2 and name.endswith("weight") and id(parameter) not in embeddings
        (decayed if matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return OPTIMIZERS[config.name]([group for group in groups if group["params"]], config)


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) with a first moment and a fixed beta2, as Parti used it.

    The second moment of a weight whose two sides are both at least `factored_from` is kept as its R row and M column
    means, V = rows columns / mean(rows) (their algorithm 4); that of any other is kept whole (algorithm 5). Moments have
    the type of their parameter. The learning rate is given: there is no relative step min(0.01, 1/sqrt(t)), and
    `parameter_scaling` (their section 8) is off unless asked for.

    torch.optim.Adafactor has no first moment, and a beta2 that only grows with the step. What of Parti is not here: its
    first moment is held in int8, a quarter of the size of ours.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.96), weight_decay: float = 0.0,
                 update_clipping: float = 1.0, parameter_scaling: bool = False, factored_from: int = 128) -> None:
        """betas: of the first moment (0 = none is kept) and of the second; update_clipping: largest root mean square of a
        weight's update / lr, d in the paper; factored_from: optax has the same.
        """
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas {betas}: both must be at least 0 and below 1")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay,
                                  "update_clipping": update_clipping, "parameter_scaling": parameter_scaling,
                                  "factored_from": factored_from})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step along the gradients that are there -> what the closure gave, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            self._start(state, parameter, group)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        # section 7.1: with this decay the moment is Adam's with its bias correction; it is 0 in the first step
        decay = beta2 * (1 - beta2 ** (state["step"] - 1)) / (1 - beta2 ** state["step"])
        update = _normalized(gradient, state, decay)
        update.div_((_rms(update) / group["update_clipping"]).clamp_(min=1))  # section 6
        update.mul_(group["lr"])
        if group["parameter_scaling"]:
            update.mul_(_rms(parameter).clamp_(min=SMALLEST_SCALE))
        if beta1:  # of the update, learning rate and all; its start from 0 is not corrected
            update = state["momentum"].lerp_(update, 1 - beta1)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)

    def _start(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> None:
        state["step"] = 0
        if group["betas"][0]:
            state["momentum"] = torch.zeros_like(parameter)
        rows = parameter.shape[0] if parameter.ndim > 1 else 1
        columns = parameter.numel() // max(1, rows)
        if min(rows, columns) >= group["factored_from"]:
            state["rows"], state["columns"] = parameter.new_zeros(rows), parameter.new_zeros(columns)
        else:
            state["square"] = torch.zeros_like(parameter)


def _normalized(gradient: Tensor, state: dict[str, Any], decay: float) -> Tensor:
    """Take a gradient into the running second moment -> a new tensor: the gradient over the root of that moment."""
    square = gradient.square().add_(SMALLEST_SQUARE)
    if "square" in state:
        return gradient * state["square"].lerp_(square, 1 - decay).rsqrt()
    matrix = square.flatten(1)  # [R, M]
    rows = state["rows"].lerp_(matrix.mean(1), 1 - decay)
    columns = state["columns"].lerp_(matrix.mean(0), 1 - decay)
    # one root at a time: where row and column had no gradient, their product is 0 in float32 and its root divides 0 by 0
    update = gradient.flatten(1) * (rows / rows.mean()).rsqrt_()[:, None]
    return update.mul_(columns.rsqrt()).view_as(gradient)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def _adafactor(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    return Adafactor(groups, config.lr, config.betas, update_clipping=config.update_clipping,
                     parameter_scaling=config.parameter_scaling)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw, "adafactor": _adafactor}


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of step 0 .. total_steps-1: a linear warm-up to the peak, then what optim.schedule names."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    return config.lr * SCHEDULES[config.schedule](step, total_steps, config)


def _progress(step: int, first: int, total_steps: int) -> float:
    """How much of the way from step `first` to the end of the run is behind: 0 .. 1."""
    return min(1.0, max(0, step - first) / max(1, total_steps - first))


def _constant(step: int, total_steps: int, config: OptimConfig) -> float:
    return 1.0


def _cosine(step: int, total_steps: int, config: OptimConfig) -> float:
    """Half a cosine down to the final ratio."""
    cosine = 0.5 * (1 + math.cos(math.pi * _progress(step, config.warmup_steps, total_steps)))
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine


def _linear(step: int, total_steps: int, config: OptimConfig) -> float:
    return 1 - (1 - config.final_lr_ratio) * _progress(step, config.warmup_steps, total_steps)


def _exponential(step: int, total_steps: int, config: OptimConfig) -> float:
    """Parti: constant up to decay_start_step, then by the same factor in every step to the final ratio at the end."""
    first = config.warmup_steps if config.decay_start_step is None else config.decay_start_step
    return config.final_lr_ratio ** _progress(step, first, total_steps)


def _halving(step: int, total_steps: int, config: OptimConfig) -> float:
    """DALL-E: half as large from each of halve_at_steps on."""
    return 0.5 ** sum(step >= halved for halved in config.halve_at_steps)


def _inverse_sqrt(step: int, total_steps: int, config: OptimConfig) -> float:
    """sqrt(warmup_steps / step), which is 1 where the warm-up ends (Vaswani et al. 2017, section 5.3)."""
    return math.sqrt(config.warmup_steps / step)


SCHEDULES: dict[str, Callable[[int, int, OptimConfig], float]] = {  # -> share of the peak learning rate, after the warm-up
    "cosine": _cosine, "constant": _constant, "exponential": _exponential, "halving": _halving,
    "inverse_sqrt": _inverse_sqrt, "linear": _linear}
