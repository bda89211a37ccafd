"""MATLAB files of the older benchmarks: a path and the variables wanted in, arrays out, or one error that says what the file is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets_ray.errors import UserError
from datasets_ray.files import must_be_data


def read_mat(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named variables, axes of length one removed, each with at least one axis. Raises UserError."""
    from scipy.io import loadmat

    must_be_data(path)
    try:
        found = loadmat(path, squeeze_me=True, variable_names=list(names))
    except Exception as error:  # scipy raises a dozen kinds on damaged files
        raise UserError(f"{path} is no MATLAB file that can be read", why=str(error), hint="download it again") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{path} is not the release's file", why=f"it has no variable {', '.join(missing)}", hint="is it another list?")
    return {name: np.atleast_1d(found[name]) for name in names}


def field(records: np.ndarray, name: str, path: Path) -> list:
    """One field of an array of MATLAB structs, a value a record; UserError where the structs have no such field."""
    if records.dtype.names is None or name not in records.dtype.names:
        raise UserError(f"{path} is not the release's file", why=f"its records have no field {name!r}")
    return [value.item() if isinstance(value, np.ndarray) and value.size == 1 else value for value in records[name]]
