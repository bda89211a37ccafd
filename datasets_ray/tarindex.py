"""Where the samples of a WebDataset archive lie: the headers of an uncompressed tar are read, its data isn't.

In: a tar. Out: its samples in order (members whose names are equal up to the first dot of the file name, as WebDataset groups them), each
member as a byte range. A tar that is cut short or damaged is an error: how many samples it has lost can't be known, so it can't be counted.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from datasets_ray.errors import UserError
from datasets_ray.files import must_be_data

BLOCK = tarfile.BLOCKSIZE


@dataclass
class Sample:
    """parts: suffix (lower case, without the first dot) → (first byte, bytes). problem: why it can't be used."""

    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    problem: str = ""


def samples(path: Path) -> list[Sample]:
    """UserError with file and byte where the archive is cut short, damaged or no tar."""
    must_be_data(path)
    found: dict[str, Sample] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            try:
                for member in archive:
                    if not member.isdir() and not member.name.startswith("__"):  # WebDataset's own notes
                        _add(found, member)
            except tarfile.TarError as error:
                raise _torn(path, archive.offset, str(error)) from None
            _ending(path, archive.offset)
    except tarfile.ReadError as error:
        raise UserError(f"{path} is no uncompressed tar", why=str(error), hint="gunzip it, or download it again") from None
    except OSError as error:
        raise UserError(f"{path} can't be read", why=error.strerror or str(error)) from None
    return list(found.values())


def _add(found: dict[str, Sample], member: tarfile.TarInfo) -> None:
    pure = PurePosixPath(member.name)
    stem, _, suffix = pure.name.partition(".")
    key, suffix = str(pure.with_name(stem)) if stem else str(pure), suffix.lower()
    sample = found.setdefault(key, Sample(key))
    if pure.is_absolute() or ".." in pure.parts:
        sample.problem = "its name leads out of the archive"
    elif member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        sample.problem = "a member is no plain file"
    elif suffix in sample.parts:
        sample.problem = "two members of one name"
    else:
        sample.parts[suffix] = (member.offset_data, member.size)


def _ending(path: Path, at: int) -> None:
    """UserError unless the archive's end mark, a block of zeros, is where reading stopped: `tarfile` stops silently at a damaged header."""
    with path.open("rb") as file:
        file.seek(at)
        block = file.read(BLOCK)
    if block != bytes(BLOCK):
        raise _torn(path, at, "damaged header" if len(block) == BLOCK else "the end mark is missing")


def _torn(path: Path, at: int, why: str) -> UserError:
    hint = "download it again, or name the other archives in `files`"
    return UserError(f"{path} is cut short or damaged", why=f"byte {at}: {why}", hint=hint)
