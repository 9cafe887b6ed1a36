"""AdamW, and Adafactor as Parti used it, with decay on matrices only; the learning rate by step."""

# Axes: R rows and M columns of a weight seen as a matrix; a convolution [R, C, kh, kw] is seen as
#       [R, M = C*kh*kw]

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from training.config.optim import OptimConfig

SMALLEST_SQUARE = 1e-30  # eps1 of Shazeer & Stern 2018: added to every squared gradient
SMALLEST_SCALE = 1e-3  # eps2: least size of a weight when steps are scaled by the weights


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Make the optimizer of a module.

    Weights of linear and convolution layers decay; gains, biases, embeddings and positions do not.
    """
    # an embedding is a table of vectors and no matrix of a product, though it is called weight too
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim >= 2 and name.endswith("weight")  # gains and biases are vectors
        if is_matrix and id(parameter) not in embeddings:
            decayed.append(parameter)
        else:
            plain.append(parameter)

    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]  # torch refuses an empty one
    return OPTIMIZERS[config.name](groups, config)


class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) as in Parti: first moment, fixed beta2.

    The second moment of a weight whose two sides are both at least `factored_from` is kept as its R
    row and M column means, V = rows columns / mean(rows) (their algorithm 4); that of any other is
    kept whole (algorithm 5). Moments have the type of their parameter. The learning rate is given:
    there is no relative step min(0.01, 1/sqrt(t)), and `parameter_scaling` (their section 8) is off
    unless asked for.

    torch.optim.Adafactor has no first moment, and a beta2 that only grows with the step. One thing
    of Parti is not here: its first moment is held in int8, a quarter of the size of ours.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.96),
                 weight_decay: float = 0.0, update_clipping: float = 1.0,
                 parameter_scaling: bool = False, factored_from: int = 128) -> None:
        """betas: of the first moment (0 = none is kept) and of the second.

        update_clipping: largest root mean square of a weight's update / lr, d in the paper.
        factored_from: optax has the same default.
        """
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas {betas}: both must be at least 0 and below 1")
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay,
                    "update_clipping": update_clipping, "parameter_scaling": parameter_scaling,
                    "factored_from": factored_from}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the gradients that are there; return the closure's result, if any."""
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
            self._init_state(state, parameter, group)
        state["step"] += 1
        step, lr = state["step"], group["lr"]
        beta1, beta2 = group["betas"]

        # section 7.1: with this decay the moment is Adam's with bias correction; in the first step
        # it is 0, and the moment the gradient's own square
        decay = beta2 * (1 - beta2 ** (step - 1)) / (1 - beta2**step)
        update = _normalize(gradient, state, decay)

        # section 6: update clipping
        excess = _rms(update) / group["update_clipping"]
        update.div_(excess.clamp_(min=1))
        update.mul_(lr)
        if group["parameter_scaling"]:
            scale = _rms(parameter).clamp_(min=SMALLEST_SCALE)
            update.mul_(scale)

        if beta1:  # of the update, learning rate and all; its start from 0 is not corrected
            update = state["momentum"].lerp_(update, 1 - beta1)
        # decay is decoupled from the moments, as in AdamW
        parameter.mul_(1 - lr * group["weight_decay"]).sub_(update)

    def _init_state(self, state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> None:
        state["step"] = 0
        beta1, _ = group["betas"]
        if beta1:
            state["momentum"] = torch.zeros_like(parameter)

        # a vector is one row, so it is never factored
        rows = parameter.shape[0] if parameter.ndim > 1 else 1
        columns = parameter.numel() // max(1, rows)
        if min(rows, columns) >= group["factored_from"]:
            state["rows"] = parameter.new_zeros(rows)
            state["columns"] = parameter.new_zeros(columns)
        else:
            state["square"] = torch.zeros_like(parameter)


def _normalize(gradient: Tensor, state: dict[str, Any], decay: float) -> Tensor:
    """Update the running second moment; return the gradient over the root of the moment."""
    square = gradient.square().add_(SMALLEST_SQUARE)
    if "square" in state:
        moment = state["square"].lerp_(square, 1 - decay)
        return gradient * moment.rsqrt()

    square = square.flatten(1)  # [R, M]
    rows = state["rows"].lerp_(square.mean(1), 1 - decay)  # [R]
    columns = state["columns"].lerp_(square.mean(0), 1 - decay)  # [M]
    # One root at a time: where row and column had no gradient, their product is 0 in float32 and
    # its root divides 0 by 0.
    row_factors = (rows / rows.mean()).rsqrt_()  # V = (rows / mean(rows)) columns
    update = gradient.flatten(1) * row_factors[:, None]
    return update.mul_(columns.rsqrt()).view_as(gradient)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


Groups = list[dict[str, Any]]


def _adamw(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def _adafactor(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    return Adafactor(groups, config.lr, config.betas, update_clipping=config.update_clipping,
                     parameter_scaling=config.parameter_scaling)


OPTIMIZERS: dict[str, Callable[[Groups, OptimConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw, "adafactor": _adafactor}


def lr_at(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of step 0 .. total_steps-1: a linear warm-up, then the schedule."""
    if step < config.warmup_steps:  # + 1: step 0 learns already, the last one at the peak
        return config.lr * (step + 1) / config.warmup_steps
    schedule = SCHEDULES[config.schedule]
    return config.lr * schedule(step, total_steps, config)


def _progress(step: int, first: int, total_steps: int) -> float:
    """The share of the way from step `first` to the end of the run: 0 .. 1."""
    done = max(0, step - first)  # negative where decay_start_step is still ahead
    return min(1.0, done / max(1, total_steps - first))


def _constant(step: int, total_steps: int, config: OptimConfig) -> float:
    return 1.0


def _cosine(step: int, total_steps: int, config: OptimConfig) -> float:
    """Half a cosine down to the final ratio."""
    progress = _progress(step, config.warmup_steps, total_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine


def _linear(step: int, total_steps: int, config: OptimConfig) -> float:
    return 1 - (1 - config.final_lr_ratio) * _progress(step, config.warmup_steps, total_steps)


def _exponential(step: int, total_steps: int, config: OptimConfig) -> float:
    """Parti: constant up to decay_start_step, then by one factor per step to the final ratio."""
    first = config.warmup_steps if config.decay_start_step is None else config.decay_start_step
    return config.final_lr_ratio ** _progress(step, first, total_steps)


def _halving(step: int, total_steps: int, config: OptimConfig) -> float:
    """DALL-E: half as large from each of halve_at_steps on."""
    halvings = sum(step >= at for at in config.halve_at_steps)
    return 0.5**halvings


def _inverse_sqrt(step: int, total_steps: int, config: OptimConfig) -> float:
    """sqrt(warmup_steps / step): 1 where the warm-up ends (Vaswani et al. 2017, section 5.3)."""
    return math.sqrt(config.warmup_steps / step)


SCHEDULES: dict[str, Callable[[int, int, OptimConfig], float]] = {
    "cosine": _cosine, "constant": _constant, "exponential": _exponential, "halving": _halving,
    "inverse_sqrt": _inverse_sqrt, "linear": _linear}
"""Schedule -> the share of the peak learning rate after the warm-up."""
