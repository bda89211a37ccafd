"""A process's memory of what it has made before: many arms read the same rows and images, so they are tokenised and decoded once.

In: a key (content, never a mutable place) and a value of known size. Out: the value again, until newer ones have pushed it out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Kept(Generic[V]):
    """Least recently used values up to `limit` bytes; safe between threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._items: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> V | None:
        with self._lock:
            found = self._items.get(key)
            if found is None:
                return None
            self._items.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: V, nbytes: int) -> None:
        """Keeps the value unless it alone is over the limit."""
        if nbytes > self.limit:
            return
        with self._lock:
            old = self._items.pop(key, None)
            self.nbytes += nbytes - (old[1] if old else 0)
            self._items[key] = (value, nbytes)
            while self.nbytes > self.limit:
                self.nbytes -= self._items.popitem(last=False)[1][1]
