"""Random state of this process: what a stage begins with, a checkpoint keeps, and a second forward pass of the same batch starts from."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor


def begin_alike() -> None:
    """The same random state at the start of every stage, so that nothing depends on what this process ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a stack trace for every device that isn't there, 2 ms each time
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    torch.set_grad_enabled(True)


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
