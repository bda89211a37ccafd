"""A judge on a small server of our own: verdicts, trouble on the way, what is cached, and that the key is nowhere."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from datasets_ray.errors import UserError
from datasets_ray.rows import row, write_rows
from trainers import judging, score
from trainers.context import Context
from trainers.judge import Judge, Reply

KEY = "sk-secret-0123456789"


class Server:
    """Answers by `says`: the user's words and how often anything was asked before → (status, reply, seconds to wait)."""

    def __init__(self) -> None:
        self.says: Callable[[str, int], tuple[int, Any, float]] = lambda words, asked: (200, "1.0", 0.0)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.open, self.most, lock, outer = 0, 0, threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.asked)
                    outer.asked.append({**body, "path": self.path})
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.open += 1
                    outer.most = max(outer.most, outer.open)
                status, reply, seconds = outer.says(body["messages"][-1]["content"], number)
                time.sleep(seconds)
                with lock:
                    outer.open -= 1
                told = {"model": "served-1", "choices": [{"message": {"role": "assistant", "content": reply}}]}
                data = json.dumps(told if isinstance(reply, str) or reply is None else reply).encode()
                try:
                    self.send_response(status)
                    if status in (301, 302, 307):
                        self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the asker has gone

            def log_message(self, *given: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


def told(words: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": words}]


def test_a_conversation_is_asked_once_and_kept(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    given = {"url": server.url, "model": "m", "key_env": "JUDGE_KEY", "cache": tmp_path / "cache"}
    server.says = lambda words, asked: (200, f"said {words}", 0.0)
    assert Judge.of(given).ask([told("a"), told("b"), told("a")]) == [Reply("said a", "served-1"), Reply("said b", "served-1")] + [
        Reply("said a", "served-1")
    ]
    assert len(server.asked) == 2 and set(server.keys) == {f"Bearer {KEY}"}
    asked = server.asked[0]
    assert (asked["path"], asked["temperature"], asked["model"], asked["max_tokens"]) == ("/v1/chat/completions", 0, "m", 64)
    monkeypatch.delenv("JUDGE_KEY")
    assert Judge.of(given).ask([told("b")])[0].text == "said b" and len(server.asked) == 2, "what is kept needs no key either"
    with pytest.raises(UserError, match="JUDGE_KEY is empty"):
        Judge.of(given).ask([told("c")])
    Judge.of({**given, "model": "other", "key_env": None}).ask([told("a")])
    assert len(server.asked) == 3 and server.keys[-1] is None, "another model is another question"
    torn = next((tmp_path / "cache").rglob("*.json"))
    torn.write_text('{"text": ')
    Judge.of({**given, "key_env": None}).ask([told("a"), told("b")])
    assert len(server.asked) <= 4
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_trouble_that_passes_is_asked_again(server: Server, tmp_path: Path) -> None:
    trouble: list[tuple[int, Any, float]] = [(500, "down", 0.0), (429, "slow down", 0.0), (200, {"odd": 1}, 0.0), (200, "fine", 0.0)]
    server.says = lambda words, asked: trouble[min(asked, 3)]
    judge = Judge.of({"url": server.url, "model": "m", "wait": 0.001, "attempts": 4})
    assert judge.ask([told("a")])[0].text == "fine" and len(server.asked) == 4
    server.says = lambda words, asked: (503, "down", 0.0)
    with pytest.raises(ConnectionError, match="127.0.0.1 gave no answer in 2 attempts: HTTP 503"):
        Judge.of({"url": server.url, "model": "m", "wait": 0, "attempts": 2}).ask([told("a")])


def test_a_timeout_is_asked_again_and_told(server: Server) -> None:
    server.says = lambda words, asked: (200, "late", 2.0 if asked == 0 else 0.0)
    judge = Judge.of({"url": server.url, "model": "m", "timeout": 0.6, "wait": 0.001, "attempts": 2})
    assert judge.ask([told("a")])[0].text == "late" and len(server.asked) == 2
    server.says = lambda words, asked: (200, "late", 2.0)
    with pytest.raises(TimeoutError, match="nothing within 0.6 s"):
        judge.ask([told("b")])


def test_what_asking_again_cannot_mend_is_a_users_error(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    judge = Judge.of({"url": server.url, "model": "m", "key_env": "JUDGE_KEY", "wait": 0})
    server.says = lambda words, asked: (401, {"error": f"incorrect key {KEY}"}, 0.0)
    with pytest.raises(UserError, match="answers HTTP 401") as error:
        judge.ask([told("a")])
    assert KEY not in str(error.value) and "***" in str(error.value) and "key_env" in error.value.hint
    server.says = lambda words, asked: (302, "elsewhere", 0.0)
    with pytest.raises(UserError, match="HTTP 302"):
        judge.ask([told("a")])
    assert len(server.asked) == 2, "neither was asked twice"


def test_what_was_answered_before_a_failure_is_kept(server: Server, tmp_path: Path) -> None:
    server.says = lambda words, asked: (500, "down", 0.0) if words == "c" else (200, words, 0.0)
    given = {"url": server.url, "model": "m", "wait": 0, "attempts": 1, "concurrency": 1, "cache": tmp_path}
    with pytest.raises(ConnectionError):
        Judge.of(given).ask([told(words) for words in "abc"])
    before, server.says = len(server.asked), lambda words, asked: (200, words, 0.0)
    assert [reply.text for reply in Judge.of(given).ask([told(words) for words in "abc"])] == ["a", "b", "c"]
    assert len(server.asked) == before + 1


def test_a_question_without_an_answer_is_none_of_the_others_and_asked_again(server: Server, tmp_path: Path) -> None:
    def says(words: str, asked: int) -> tuple[int, Any, float]:
        return {"filtered": (400, {"error": "content filter"}, 0.0), "silent": (200, None, 0.0)}.get(words, (200, "0.5", 0.0))

    server.says = says
    judge = Judge.of({"url": server.url, "model": "m", "cache": str(tmp_path)})
    talks = [[{"role": "user", "content": words}] for words in ("fine", "filtered", "silent")]
    first, refused, silent = judge.ask(talks)
    assert (first.text, refused.text, silent.text) == ("0.5", "", "")
    assert "HTTP 400" in refused.why and "empty reply" in silent.why
    judge.ask(talks)
    assert [one["messages"][-1]["content"] for one in server.asked].count("fine") == 1 and len(server.asked) == 5
    with pytest.raises(UserError, match="answers nothing"):
        judge.ask(talks[1:])


def test_a_key_that_no_header_takes_is_never_quoted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-one\nsk-two")
    with pytest.raises(UserError, match="holds no key") as caught:
        Judge.of({"url": server.url, "model": "m", "key_env": "JUDGE_KEY"}).ask([[{"role": "user", "content": "x"}]])
    assert "sk-" not in str(caught.value) and not server.asked


def test_no_more_than_the_limit_are_open_at_once(server: Server) -> None:
    server.says = lambda words, asked: (200, words, 0.02)
    Judge.of({"url": server.url, "model": "m", "concurrency": 3}).ask([told(str(n)) for n in range(12)])
    assert 1 < server.most <= 3


@pytest.mark.parametrize(("given", "says"), [
    ({"model": "m"}, "no url"), ({"url": "http://h/v1"}, "no model"), ({"url": "h/v1", "model": "m"}, "no http"),
    ({"url": "http://me:secret@h/v1", "model": "m"}, "a key belongs"), ({"url": "http://h/v1?key=x", "model": "m"}, "a key belongs"),
    ({"url": "http://h/v1", "model": "m", "modle": 1}, "unknown key 'modle'"),
    ({"url": "http://h", "model": "m", "attempts": 0}, "1 or more"),
])  # fmt: skip
def test_a_bad_judge_says_what_is_wrong(given: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Judge.of(given)


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def predicted(folder: Path, cases: list[tuple[str, str, list[str], dict[str, Any]]]) -> dict[str, Path]:
    """(text, right answer, options, meta) → the artefacts of questions and predictions."""
    questions = [
        row(f"q{n}", images=[], question=f"Question {n}?", options=options, answer=answer, meta=meta)
        for n, (_, answer, options, meta) in enumerate(cases)
    ]
    write_rows(questions, folder / "questions")
    made = [{**{k: one[k] for k in ("id", "options", "answer", "label", "meta")}, "text": c[0]} for one, c in zip(questions, cases)]
    (folder / "predictions").mkdir()
    parquet.write_table(pa.Table.from_pylist(made), folder / "predictions" / "predictions.parquet")
    return {"p": folder / "predictions", "q": folder / "questions"}


def scored(folder: Path, inputs: dict[str, Path], prompt: str, metric: str, **settings: Any) -> tuple[dict[str, Any], Path]:
    spec = {"predictions": "p", "questions": "q", "rule": "vlmevalkit", "metric": metric, "judge": judging.identity("m", prompt)}
    stage = {"id": "s", "spec": spec, "runtime": {"judge": settings}}
    ctx = Context.local(folder / "stage", stage, inputs)
    return score.run(spec, ctx), ctx.out


JUDGED = {"open": "judged", "category": "rec"}


def test_grades_are_the_score_and_nonsense_is_invalid(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    grades = {"red": "0.5", "four red chairs": "1.0", "blue": "Grade: 0.0", "odd": "hm, 0.3 or 0.7", "over": "7"}
    server.says = lambda words, asked: (200, grades[words.rsplit("Answer: ", 1)[1].split("\n")[0]], 0.0)
    inputs = predicted(tmp_path, [*((text, "four <AND> red", [], JUDGED) for text in grades), ("", "four", [], JUDGED)])
    scores, out = scored(tmp_path, inputs, "grade", "graded", url=server.url, key_env="JUDGE_KEY")
    assert scores["value"] == pytest.approx(100 * 1.5 / 6) and scores["n"] == 6 and scores["valid"] == 0.5
    assert scores["judge"] == {"asked": 5, "unreadable": 2, **judging.identity("m", "grade")}
    assert scores["chance"] is None and "nothing to guess" in scores["no_chance"] and scores["wholly_right"] == pytest.approx(1 / 6)
    table = parquet.read_table(out / "scored.parquet")
    assert table.column("credit").to_pylist() == [0.5, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert table.column("judged").to_pylist() == [*grades.values(), None]
    assert any("Question: Question 0?\nRight answer: four <AND> red\nAnswer: red" in a["messages"][1]["content"] for a in server.asked)
    again, _ = scored(tmp_path, inputs, "grade", "graded", url="http://127.0.0.1:9/v1", attempts=1)
    assert again == scores and len(server.asked) == 5, "a run that was killed asks nothing again, not even of another address"
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_without_a_judge_the_benchmark_is_not_run(tmp_path: Path) -> None:
    inputs = predicted(tmp_path, [("red", "red", [], JUDGED), ("A", "A", ["x", "y"], {})])
    spec = {"predictions": "p", "rule": "vlmevalkit", "metric": "graded"}
    ctx = Context.local(tmp_path / "stage", {"id": "s", "spec": spec}, inputs)
    scores = score.run(spec, ctx)
    assert "needs a judge model and none is given" in scores["not_run"] and "value" not in scores
    assert (scores["n"], scores["left_out"]) == (0, {score.NO_JUDGE: 1})
    assert not (ctx.out / "scored.parquet").exists() and json.loads((ctx.out / "scores.json").read_text()) == scores


def test_a_verdict_is_right_wrong_or_invalid(server: Server, tmp_path: Path) -> None:
    verdicts = {"I think so": "correct", "surely not": "Incorrect.", "who knows": "unclear", "hm": "correct or incorrect"}
    server.says = lambda words, asked: (200, verdicts[words.rsplit("Answer: ", 1)[1].split("\n")[0]], 0.0)
    inputs = predicted(tmp_path, [(text, "yes", [], {"open": "yes_no"}) for text in verdicts])
    scores, out = scored(tmp_path, inputs, "verdict", "accuracy", url=server.url)
    assert (scores["value"], scores["valid"], scores["judge"]["unreadable"]) == (25.0, 0.5, 2)
    assert parquet.read_table(out / "scored.parquet").column("correct").to_pylist() == [True, False, False, False]


def test_an_answer_is_taken_out_of_a_longer_text_and_read_by_the_rule(server: Server, tmp_path: Path) -> None:
    cases = [
        ("1.5", "1.5", [], {"open": "number"}), ("so 9 over 6, that is 1.5, of 3", "1.5", [], {"open": "number"}),
        ("B", "B", ["x", "y"], {}), ("both have merit, x less so than y", "B", ["x", "y"], {}), ("no idea at all", "A", ["x", "y"], {}),
    ]  # fmt: skip
    taken = {"so 9": "1.5", "both": "B", "no i": "none"}
    server.says = lambda words, asked: (200, taken[words.rsplit("Text: ", 1)[1][:4]], 0.0)
    scores, out = scored(tmp_path, predicted(tmp_path, cases), "extract", "accuracy", url=server.url)
    assert parquet.read_table(out / "scored.parquet").column("correct").to_pylist() == [True, True, True, True, False]
    assert (scores["value"], scores["valid"], scores["judge"]["asked"], len(server.asked)) == (80.0, 0.8, 3, 3)
    assert parquet.read_table(out / "scored.parquet").column("letter").to_pylist() == [None, None, "B", "B", None]
    assert not any("Right answer" in asked["messages"][1]["content"] for asked in server.asked), "the judge must not know it"


def test_prompts_are_versioned_data(tmp_path: Path) -> None:
    assert judging.names() == ["extract", "grade", "verdict"]
    for name in judging.names():
        asked = judging.prompt(name)
        assert {"about", "source", "system", "ask", "max_tokens", "reply"} == set(asked) and "{answer}" in asked["ask"]
        assert judging.identity("m", name)["version"] == judging.identity("other", name)["version"]
    assert len({judging.identity("m", name)["version"] for name in judging.names()}) == 3
    assert ("{right}" in judging.prompt("extract")["ask"]) is False
    with pytest.raises(UserError, match="did you mean 'grade'"):
        judging.prompt("grades")
    stale = {"predictions": "p", "rule": "strict", "metric": "graded", "judge": {"model": "m", "prompt": "grade", "version": "0"}}
    with pytest.raises(UserError, match="prompt 'grade' has changed"):
        score.judging_of(stale, Context.local(tmp_path, {"id": "s", "spec": stale}))
