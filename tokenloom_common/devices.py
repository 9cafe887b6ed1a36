"""The device that a command computes on."""

from __future__ import annotations

import torch

from tokenloom_common.errors import UserError


def choose_device(name: str | None) -> str:
    """Return the device of --device, or the GPU if there is one.

    UserError for one that is not usable.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {name}: this machine has no usable GPU; "
                            "leave --device out, or say --device cpu")
        # torch knows devices that this machine or this build does not have
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(
            f"--device {name}: not a device of this machine; use cpu, cuda or cuda:0") from None
    return name
