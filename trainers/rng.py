"""Random state of this process, as tensors: what a checkpoint keeps, and what a second forward pass of the same batch starts from."""

from __future__ import annotations

import torch
from torch import Tensor


def capture(device: str) -> dict[str, Tensor]:
    """uint8 states by name: the host's generator and, on a GPU, the device's."""
    states = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
