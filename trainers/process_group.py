"""The worker group's channels: torch's process group for the stages, and a key-value store for the lane itself.

In: MASTER_ADDR, MASTER_PORT and ranks, set by `LaneBackend` on Ray Train's workers. Out: an initialised process group and a
`Channel` on which ranks agree without collectives, so that a rank stuck inside a collective can be told from a slow one.
Importing this file loads Ray Train but not torch: the controller that unpickles the backend stays light.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

from ray.train.backend import Backend, BackendConfig


class LaneBackend(Backend):
    """Tells all workers where rank 0 listens; the process group itself is made inside `trainers.lane.serve`."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, _address_and_port)
        worker_group.execute(_set_master, address, port)


class LaneBackendConfig(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return LaneBackend


def _address_and_port() -> tuple[str, int]:
    from ray.train._internal.utils import get_address_and_port

    return get_address_and_port()


def _set_master(address: str, port: int) -> None:
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))


class Channel:
    """Small JSON messages between the ranks of a lane, through torch's TCPStore (rank 0 serves it)."""

    def __init__(self, rank: int, world: int, backend: str, collective_seconds: float) -> None:
        import torch.distributed as dist

        self.rank, self.world = rank, world
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=rank == 0, timeout=timedelta(seconds=300)
        )
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        limit = timedelta(seconds=collective_seconds)
        dist.init_process_group(backend, store=dist.PrefixStore("group", self.store), rank=rank, world_size=world, timeout=limit)
        self._mine = dist.PrefixStore("lane", self.store)

    def put(self, key: str, message: Any) -> None:
        self._mine.set(key, json.dumps(message))
        self._mine.check([key])  # a round trip: the message is there for everyone once this returns

    def peek(self, key: str) -> Any | None:
        """The message if it is there."""
        return json.loads(self._mine.get(key)) if self._mine.check([key]) else None

    def wait(self, key: str, seconds: float | None) -> Any | None:
        """The message, or None after `seconds` (None: waits until it is there or rank 0 is gone, which raises)."""
        import torch.distributed as dist

        while True:
            try:
                self._mine.wait([key], timedelta(seconds=3600 if seconds is None else seconds))
                return json.loads(self._mine.get(key))
            except dist.DistStoreError:
                if seconds is not None:
                    return None

    def forget(self, key: str) -> None:
        self._mine.delete_key(key)

    def usable(self, number: int, seconds: float) -> bool:
        """Whether gloo collectives still match after an exception: every rank contributes the claim's number to a sum."""
        import torch
        import torch.distributed as dist

        if self.world == 1:
            return True
        if dist.get_backend() != "gloo":
            return False  # an NCCL communicator can't be probed without risking a hang: rebuild the group
        probe = torch.tensor([float(number)], dtype=torch.float64)
        try:
            dist.all_reduce(probe, async_op=True).wait(timedelta(seconds=seconds))
        except RuntimeError:
            return False
        return probe.item() == float(number) * self.world

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()
