"""What an exception in a stage means for the run: try again, try once more, or not at all.

In: an exception. Out: a Failure (kind, one line for people, traceback for the log). Deterministic failures are not retried,
infrastructure ones are up to a limit, out of memory once; an interruption, a lost lease or a full disk counts as no attempt.
"""

from __future__ import annotations

import errno
import traceback
from dataclasses import asdict, dataclass
from typing import Any

from datasets_ray.errors import UserError
from trainers.context import Interrupted, LeaseLost
from trainers.store import Damaged

INFRASTRUCTURE, MEMORY, DETERMINISTIC = "infrastructure", "memory", "deterministic"
INTERRUPTED, LOST, DAMAGED, FULL = "interrupted", "lost", "damaged", "full"

# by name, so that neither torch nor ray has to be imported to know them
INFRASTRUCTURE_TYPES = {
    *("RayActorError", "ActorDiedError", "ActorUnavailableError", "ObjectLostError", "OwnerDiedError", "WorkerCrashedError"),
    *("NodeDiedError", "RaySystemError", "ObjectReconstructionFailedError", "AuthenticationError", "ObjectFetchTimedOutError"),
    *("GetTimeoutError", "LocalRayletDiedError", "ObjectStoreFullError"),
    *("DistBackendError", "DistNetworkError", "DistStoreError", "DistError", "ConnectionError", "TimeoutError"),
}
MEMORY_TYPES = {"OutOfMemoryError", "MemoryError"}
# as libraries word it that lose the error's number (safetensors, torch, Ray, SQLite)
FULL_WORDS = ("no space left on device", "disk quota exceeded", "disk is full", "storagefull", "outofdiskerror")
# gloo and NCCL raise RuntimeError with these words
INFRASTRUCTURE_WORDS = ("connection closed by peer", "connection reset", "gloo", "nccl", "socket timeout", "broken pipe", "timed out")
LOCAL_MISTAKES = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class Failure:
    kind: str
    message: str
    """One line."""
    detail: str = ""
    """The traceback; empty for a user's mistake."""
    damaged: str | None = None
    """The input stage whose artefact has to be made again."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what it came from, says that a disk is full or a quota used up."""
    while error is not None:
        words = f"{type(error).__name__} {error}".lower()
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(word in words for word in FULL_WORDS):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def classify(error: BaseException) -> Failure:
    """The Failure of an exception; a Ray task's error is judged by its cause."""
    if isinstance(error, UserError):
        return Failure(DETERMINISTIC, error.render())
    detail = "".join(traceback.format_exception(error))[-8000:]
    line = f"{type(error).__name__}: {error}".strip().splitlines()[0][:500]
    if isinstance(error, Interrupted):
        return Failure(INTERRUPTED, line)
    if isinstance(error, LeaseLost):
        return Failure(LOST, line)
    if isinstance(error, Damaged):
        return Failure(DAMAGED, line, detail, error.stage)
    if disk_full(error):
        return Failure(FULL, line, detail)
    names = {base.__name__ for base in type(error).__mro__}
    cause = getattr(error, "cause", None)
    if "RayTaskError" in names and isinstance(cause, BaseException) and cause is not error:
        inner = classify(cause)
        return Failure(inner.kind, inner.message, detail, inner.damaged)
    if names & MEMORY_TYPES or "out of memory" in str(error).lower():
        return Failure(MEMORY, line, detail)
    infrastructure = bool(names & INFRASTRUCTURE_TYPES) or (isinstance(error, OSError) and not isinstance(error, LOCAL_MISTAKES))
    if type(error) is RuntimeError and any(word in str(error).lower() for word in INFRASTRUCTURE_WORDS):
        infrastructure = True
    return Failure(INFRASTRUCTURE if infrastructure else DETERMINISTIC, line, detail)
