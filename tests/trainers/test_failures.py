"""What an exception means for the run: a full disk waits, whichever library met it, and is told apart from other losses."""

from __future__ import annotations

import errno

import pytest

from datasets_ray.errors import UserError
from trainers import failures


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = {
    "the system": OSError(errno.ENOSPC, "No space left on device"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": RuntimeError('Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "..." }'),
    "torch": chained(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), OSError(errno.ENOSPC, "full")),
    "Ray": type("OutOfDiskError", (RuntimeError,), {})("The object cannot be created because the local object store is full"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_a_full_disk_is_its_own_kind(error: Exception) -> None:
    assert failures.classify(error).kind == failures.FULL


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.EIO, "Input/output error"), failures.INFRASTRUCTURE), (MemoryError(), failures.MEMORY),
        (FileNotFoundError(errno.ENOENT, "no file"), failures.DETERMINISTIC),
        (RuntimeError("gloo: connection closed by peer"), failures.INFRASTRUCTURE),
        (UserError("no space left on device"), failures.DETERMINISTIC), (ValueError("bad"), failures.DETERMINISTIC),
    ],
)  # fmt: skip
def test_nothing_else_is(error: Exception, kind: str) -> None:
    assert failures.classify(error).kind == kind
