"""What tests of commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from grid import options


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs a command that must end with a message; the message."""
    monkeypatch.chdir(tmp_path)

    def run(main, words: list[str]) -> str:
        with pytest.raises(SystemExit) as leaving:
            options.run(main, words)
        said = capsys.readouterr()
        assert leaving.value.code == 1 and "Traceback" not in said.err
        return said.err

    return run


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of five arms with its report, made once for all tests that only read it."""
    from grid import report
    from tests.grid.synthetic_run import make_run, small_plan

    out = make_run(tmp_path_factory.mktemp("run"), small_plan())
    report.write(out)
    return out
