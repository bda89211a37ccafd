"""Optimisations that can be turned off, one by one or all together, without changing what is computed: the plain path beside the fast one.

In: names, from a profile's `resources.disable` or a test. Out: `on(name)`, asked where the two paths part. Each path gives the same loss,
gradient and answers up to rounding (tests/trainers/test_switches.py), so nothing here belongs to a stage's identity. For whoever doubts a
number, suspects a kernel, or wants to know what an optimisation is worth.

The state is the process's, not a thread's: on a GPU activations are recomputed in autograd's own threads.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

from datasets_ray.errors import UserError, nearest

SWITCHES: dict[str, str] = {
    "packs": "samples share micro-batches; off: a micro-batch a sample",
    "segments": "attention segment by segment, by variable-length kernels on a GPU; off: one dense block-diagonal mask a pack",
    "logits": "logits at learned positions only, some at a time; off: at every position, all at once",
    "images": "packs of text alone pass by a frozen encoder; off: it reads a black image, whose tokens are dropped",
    "lean": "gradients of norms and rotations written out; off: as autograd finds them",
    "layers": "on a CPU, layers as one function each (needs `lean` and `segments`); off: as the library's modules",
    "products": "attention of short segments in them by matrix products; off: by torch's fused kernel",
    "fused": "AdamW as one fused kernel; off: tensor by tensor",
    "pixels": "decoded images kept on disk (`pixels_mb`); off: decoded again by every stage",
    "features": "outputs of frozen encoders kept on disk where it pays (`features_mb`); off: images are encoded by every stage",
    "offsets": "questions are tokenised without offsets, and what they begin with once; off: as rows that are learned from",
    "prefixes": "what questions of a batch have in common is read once; off: every question from its beginning",
}
"""Name → what it does, and what is done without it."""
ALL = "all"

_off: frozenset[str] = frozenset()


def on(name: str) -> bool:
    """Whether the optimisation is used."""
    assert name in SWITCHES, name
    return name not in _off


def named(names: Iterable[str]) -> frozenset[str]:
    """The switches that are meant, `all` being all of them. Raises UserError for a name that doesn't exist."""
    found: set[str] = set()
    for name in names:
        if name != ALL and name not in SWITCHES:
            raise UserError(f"no optimisation is called {name!r}", hint=nearest(name, [*SWITCHES, ALL]))
        found.update(SWITCHES if name == ALL else [name])
    return frozenset(found)


@contextmanager
def without(names: Iterable[str]) -> Generator[None]:
    """Inside, these are turned off, too."""
    global _off
    before = _off
    _off = before | named(names)
    try:
        yield
    finally:
        _off = before
