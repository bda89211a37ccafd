"""Memory that layers write to, kept from one micro-batch to the next: fresh pages cost a CPU more than many of the passes over them.

    lease = Lease(workspace) ──lease.take(rows, columns)──► float32 tensors, uninitialised ──lease.end()──► the next lease's

In: shapes, which differ from micro-batch to micro-batch. Out: parts of buffers that some lease before has written to. What an allocator
gives back to the system after each backward pass, it gets back page by page, zeroed: a tenth of a small model's step. A lease that
never ends (a graph without a backward pass) keeps its buffers to itself, and they go with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPARE = 1.125
"""A new buffer holds this many times what is asked for: the next micro-batch is rarely as long."""
LARGEST = 2.0
"""A buffer above this many times what is asked for waits for somebody else."""


class Workspace:
    """Buffers that nobody leases at the moment."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []

    def take(self, numel: int) -> Tensor:
        """float[N] of at least numel: the smallest that will do; else a new one in place of the largest that is too small."""
        sizes = [(len(buffer), number) for number, buffer in enumerate(self.free)]
        fit = min((one for one in sizes if numel <= one[0] <= LARGEST * numel), default=None)
        if fit is not None:
            return self.free.pop(fit[1])
        short = max((one for one in sizes if one[0] < numel), default=None)
        if short is not None:
            del self.free[short[1]]
        return torch.empty(math.ceil(SPARE * numel))


class Lease:
    """What one user takes and gives back at once. Without a workspace: plain new tensors."""

    def __init__(self, workspace: Workspace | None) -> None:
        self.workspace = workspace
        self.held: list[Tensor] = []

    def take(self, *shape: int) -> Tensor:
        """float32 of this shape on the CPU, uninitialised."""
        if self.workspace is None:
            return torch.empty(shape)
        numel = math.prod(shape)
        self.held.append(buffer := self.workspace.take(numel))
        return buffer[:numel].view(shape)

    def end(self) -> None:
        if self.workspace is not None:
            self.workspace.free += self.held
            self.held = []
