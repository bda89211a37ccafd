"""What people are told: plain lines off a terminal, each thing once, an honest time left."""

from __future__ import annotations

import io

import pytest

from grid.display import Display, duration
from grid.ledger import LedgerCore
from tests.grid.toy_plan import plan, stage


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        raise OSError


@pytest.fixture
def run(tmp_path):
    now = [0.0]
    made = plan([stage(f"x-{i}", steps=10) for i in range(4)], {"one": ["x-0", "x-1"], "two": ["x-2", "x-3"]})
    ledger = LedgerCore(made, [], tmp_path, clock=lambda: now[0])
    ledger.lane_up("lane-0", 1)
    return made, ledger, now


def test_time_left_scales_the_plan_by_what_stages_took(run):
    made, ledger, now = run
    display = Display(made, lanes=1, stream=io.StringIO(), clock=lambda: now[0])
    assert display.seconds_left(ledger.snapshot()) is None
    ledger.claim("lane-0")
    display.update(ledger.snapshot())
    now[0] = 30.0  # three times what was planned
    ledger.finish("lane-0", "x-0", {})
    display.update(ledger.snapshot())
    assert display.seconds_left(ledger.snapshot()) == pytest.approx(90.0)
    ledger.claim("lane-0")
    display.update(ledger.snapshot())
    now[0] = 40.0
    assert display.seconds_left(ledger.snapshot()) == pytest.approx(80.0)


def test_plain_lines_carry_no_control_characters_and_say_each_arm_once(run):
    made, ledger, now = run
    stream = io.StringIO()
    display = Display(made, lanes=1, stream=stream, clock=lambda: now[0])
    while grant := ledger.claim("lane-0"):
        now[0] += 50
        display.update(ledger.snapshot())
        identity = grant["stage"]["id"]
        if identity == "x-3":
            ledger.fail("lane-0", identity, {"kind": "deterministic", "message": "no good\n  hint: none"})
        else:
            ledger.finish("lane-0", identity, {})
        display.update(ledger.snapshot())
        display.update(ledger.snapshot())
    text = stream.getvalue()
    assert "\x1b" not in text
    assert text.count("done    one") == 1 and text.count("failed  two: x 3: no good\n") == 1
    assert "0 of 4 stages; now: x 0\n" in text


@pytest.mark.parametrize(("environment", "colored"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_live_lines_are_erased_before_anything_is_said(run, monkeypatch, environment, colored):
    made, ledger, now = run
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    display = Display(made, lanes=1, stream=stream, clock=lambda: now[0])
    ledger.claim("lane-0")
    display.update(ledger.snapshot())
    assert "lane-0  x 0" in stream.getvalue() and "0 of 4 stages" in stream.getvalue()
    display.say("hello")
    assert stream.getvalue().endswith("\x1b[2A\x1b[Jhello\n")
    ledger.notices.append("careful")
    display.update(ledger.snapshot())
    assert ("\x1b[33mcareful" in stream.getvalue()) == colored


def test_durations_read_like_a_person_would_say_them():
    assert [duration(s) for s in (4.4, 200, 7500)] == ["4 s", "3 min 20 s", "2 h 05 min"]
