"""Shared by all tests: where the real photographs lie, quiet libraries, one thread each."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # as in a run: what still streams when Ray is shut down must not start another one

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def find_data() -> Path | None:
    """FINEGRID_DATA, else `../shared/data` beside the repository; None where neither exists."""
    named = os.environ.get("FINEGRID_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real photographs and benchmark files; a test that needs it is skipped where it is absent."""
    folder = find_data()
    if folder is None:
        pytest.skip("no real data here: set FINEGRID_DATA to the folder of photographs and benchmark files")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY
