"""Streaming: a task over a list of row numbers, run ahead of its consumer, in order.

In: a picklable task `row numbers → (result, Stats)` and the row numbers of every step. Out: a `Stream` of the results. With Ray running,
Ray Data runs the task in tasks of a quarter core, several steps each, and hands the results on in order; without, a thread does.
Until Ray Data delivers (it takes a fraction of a second to start, and seconds where its workers start too) a thread does, too.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from datasets_ray import ray_habits
from datasets_ray.encoding import Stats
from datasets_ray.pixels_cache import PixelCounts

if TYPE_CHECKING:
    from datasets_ray.features_cache import FeatureCounts

T = TypeVar("T")
Task = Callable[[np.ndarray], tuple[T, Stats]]

CPUS = 0.25
"""What a data task reserves: less than it may use, so that training isn't kept off a small machine."""
WORKERS = 2
"""Data tasks of one stream at a time."""
BLOCKS = 256
"""A stream is cut into about so many tasks at most."""
TASK_BYTES, LARGE_BYTES, MOST_STEPS = 8 << 20, 32 << 20, 64
"""The first and the last tasks make about so many bytes of results, those between up to the second, and none more steps than this:
starting one costs as much as 20 steps of a miniature, and what ran it stands still until Ray Data looks again, up to 0.1 s."""
HEAD_BYTES = 1 << 20
"""So much of a stream's beginning is left to the consumer's own thread, all of a stream of up to twice as much. 0: nothing is."""
CHUNK_BYTES, CHUNK_SECONDS = 4 << 20, 0.5
"""Results are handed on together up to this size and this time, the first one of a task alone: handing on costs about 10 ms."""
STORE_BYTES = 256 << 20
"""Results of one stream that may wait in the object store."""


@dataclass(frozen=True)
class _Failed:
    """An exception on its way to the consumer."""

    error: BaseException


_END = object()


class Stream(Iterator[T], Generic[T]):
    """Results in order, made ahead from the moment the stream exists. Iterate once; close it (or use `with`) when you stop early.

    stats: summed over what has been handed out. waited: seconds the consumer has waited for results. step_bytes: a step's result, about.
    finish: what is done to a result here, ahead of its use as well. pixels, features: how images came, where these are kept.
    """

    def __init__(
        self, task: Task[T], steps: Sequence[np.ndarray], *, name: str, ahead: int = 2, workers: int = WORKERS, step_bytes: int = 1 << 20,
        finish: Callable[[T], T] | None = None,
    ) -> None:  # fmt: skip
        self.stats = Stats()
        self.waited = 0.0
        self.pixels: PixelCounts | None = None
        self.features: FeatureCounts | None = None
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        source = _started(task, steps, name, workers, step_bytes) if _ray_runs() else _plain(task, steps)
        self._thread = threading.Thread(target=_pump, args=(source, self._queue, self._stop, finish), name=f"data-{name}", daemon=True)
        self._thread.start()

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        begin = time.perf_counter()
        item = self._take()
        self.waited += time.perf_counter() - begin
        if item is _END or isinstance(item, _Failed):
            self.close()
            if isinstance(item, _Failed):
                raise item.error
            raise StopIteration
        result, stats = item
        self.stats.add(stats)
        return result

    def _take(self) -> Any:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=1.0)
        return _END

    def close(self) -> None:
        """Stops the work; further results are thrown away."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=10)

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._stop.set()


def _ray_runs() -> bool:
    """Ray was started by whoever runs us; we never start it."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def node() -> str:
    """The node of Ray that this process is on; the empty text without Ray."""
    if not _ray_runs():
        return ""
    import ray

    return ray.get_runtime_context().get_node_id()


def _pump(
    source: Generator[tuple[Any, Stats]], target: queue.Queue[Any], stop: threading.Event, finish: Callable[[Any], Any] | None
) -> None:  # fmt: skip
    """Moves results into the queue until the source ends or the consumer stops; the source is closed in this thread."""
    last: Any = _END
    try:
        if stop.is_set():
            return
        for result, stats in source:
            if not _put(target, (finish(result) if finish else result, stats), stop):
                break
    except BaseException as error:  # handed to the consumer, who raises it
        last = _Failed(error)
    finally:
        with contextlib.suppress(Exception):
            source.close()
    _put(target, last, stop)


def _put(target: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            target.put(item, timeout=0.2)
            return True
        except queue.Full:
            continue
    return False


def _plain(task: Task[T], steps: Sequence[np.ndarray]) -> Generator[tuple[T, Stats]]:
    for numbers in steps:
        yield task(numbers)


def _started(task: Task[T], steps: Sequence[np.ndarray], name: str, workers: int, step_bytes: int) -> Generator[tuple[T, Stats]]:
    """`_ray` for all steps but the first ones. They are made here, and those after them until Ray Data has begun to deliver: helping on
    while it is behind would make most steps twice."""
    head = min(len(steps), -(-HEAD_BYTES // max(1, step_bytes)))
    if len(steps) <= 2 * head or not head:
        yield from _plain(task, steps) if head else _ray(task, steps, name, workers, step_bytes)
        return
    arrived: queue.Queue[Any] = queue.Queue(maxsize=2)
    stop = threading.Event()
    source = _ray(task, steps[head:], name, workers, step_bytes)
    thread = threading.Thread(target=_pump, args=(source, arrived, stop, None), name=f"ray-data-{name}", daemon=True)
    thread.start()
    begun = caught_up = False
    try:
        at, next_of_ray = 0, head
        while at < len(steps):
            item = None
            if at >= head:
                with contextlib.suppress(queue.Empty):
                    item = arrived.get(block=begun)
            if item is None:
                yield task(steps[at])
                at += 1
                continue
            begun = True
            if isinstance(item, _Failed):
                raise item.error
            if next_of_ray == at:
                caught_up = True
                yield item
                break
            next_of_ray += 1
        else:
            return
        for _ in range(at + 1, len(steps)):
            item = arrived.get()
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stop.set()
        if caught_up:  # else it may wait for processes that are still starting: it ends by itself
            thread.join(timeout=10)


def _ray(task: Task[T], steps: Sequence[np.ndarray], name: str, workers: int, step_bytes: int) -> Generator[tuple[T, Stats]]:
    """The same by Ray Data: an item for each task → map_batches → one binary column, a row per step."""
    if not len(steps):
        return
    if not _ray_runs():
        raise RuntimeError("Ray was shut down while data streamed")  # its calls would start another one
    import logging

    import pyarrow as pa
    import ray.data
    from ray.data import ExecutionResources, TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it would warn that we asked for no progress bars
    ends = np.cumsum(_sizes(len(steps), step_bytes, workers)).tolist()
    packed = [np.asarray(numbers, dtype=np.int64).tobytes() for numbers in steps]
    items = [{"steps": packed[begin:end]} for begin, end in zip([0, *ends], ends)]

    def encode(block: pa.Table) -> Iterator[pa.Table]:
        made: list[bytes] = []
        room, until = 0, 0.0
        for numbers in chain.from_iterable(block.column("steps").to_pylist()):
            made.append(_dump(task, np.frombuffer(numbers, dtype=np.int64)))
            room -= len(made[-1])
            if room <= 0 or time.monotonic() >= until:
                yield pa.table({"result": _column(made)})
                made, room, until = [], CHUNK_BYTES, time.monotonic() + CHUNK_SECONDS
        if made:
            yield pa.table({"result": _column(made)})

    encode.__name__ = name  # what the dashboard shows
    # from_items and not from_arrow, which would start a whole-CPU task per block only to read its schema
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        encode, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, num_cpus=CPUS, compute=TaskPoolStrategy(workers)
    )
    context = dataset.context
    ray_habits.hurry(context, step_bytes)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # hand on what `encode` yields as it is, not joined to larger blocks
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=STORE_BYTES)
    batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
    try:
        while (table := ray_habits.next_of(batches)) is not None:
            for value in table.column("result"):
                item = pickle.loads(value.as_buffer())
                if isinstance(item, _Failed):
                    raise item.error
                yield item
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def _sizes(steps: int, step_bytes: int, workers: int) -> list[int]:
    """How many steps each task makes: few at first, so that results come soon; more and more, since each costs its start; and fewer
    again at the end, so that all workers finish together."""
    small = max(1, min(MOST_STEPS, TASK_BYTES // max(1, step_bytes)))
    large = max(small, -(-steps // BLOCKS), min(MOST_STEPS, LARGE_BYTES // max(1, step_bytes)))
    sizes: list[int] = []
    left = steps
    while left:
        sizes.append(min(left, max(small, min(large, steps - left, left // (2 * workers)))))
        left -= sizes[-1]
    return sizes


def _column(values: Sequence[bytes]) -> Any:
    """An Arrow column of these values, around their memory: `pa.array` of Python's bytes goes through them one by one."""
    import pyarrow as pa

    ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
    data = values[0] if len(values) == 1 else b"".join(values)
    return pa.Array.from_buffers(pa.large_binary(), len(values), [None, pa.py_buffer(ends), pa.py_buffer(data)])


def _dump(task: Task[T], numbers: np.ndarray) -> bytes:
    """The task's result, or its exception as a value: Ray's wrapping would hide a UserError and try the task again."""
    try:
        return pickle.dumps(task(numbers), protocol=5)
    except Exception as error:
        error.add_note(traceback.format_exc())
        with contextlib.suppress(Exception):
            return pickle.dumps(_Failed(error), protocol=5)
        return pickle.dumps(_Failed(RuntimeError(traceback.format_exc())), protocol=5)
