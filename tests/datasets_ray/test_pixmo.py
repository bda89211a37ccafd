"""PixMo: the downloader against a server of this process (good, dead, false, slow, killed and resumed), and the rows of what it fetched."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest

from datasets_ray import download as downloader
from datasets_ray.download import download, main, read_state
from datasets_ray.errors import UserError
from datasets_ray.fetch import Limits, image_path
from tests.datasets_ray.releases import BROKEN, make, parquet, picture, pixmo_table, put

SPEC = {"source": "pixmo", "part": "caption"}
QUICK = Limits(timeout=20.0, retries=1, max_bytes=20_000, pause=0.01)


class Server(ThreadingHTTPServer):
    request_queue_size = 64


class Site(BaseHTTPRequestHandler):
    """good/N an image; what the other paths do is in their name."""

    protocol_version = "HTTP/1.1"
    hits: Counter[str]
    gate: threading.Event

    def do_GET(self) -> None:
        self.hits[self.path] += 1
        what, _, rest = self.path.strip("/").partition("/")
        getattr(self, what, self.missing)(rest)

    def send(self, data: bytes, code: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def good(self, rest: str) -> None:
        self.send(picture(int(rest.split("%")[0])))

    def missing(self, rest: str) -> None:
        self.send(b"gone", 404)

    def page(self, rest: str) -> None:
        self.send(BROKEN["page.jpg"][0])

    def broken(self, rest: str) -> None:
        self.send(BROKEN["cut.jpg"][0])

    def short(self, rest: str) -> None:
        self.send(picture(), length=5000)
        self.close_connection = True

    def slow(self, rest: str) -> None:
        """A byte now and then: no single wait is long, all of them never end."""
        self.send(b"", length=5000)
        while not self.gate.wait(0.05):
            try:
                self.wfile.write(b"x")
            except OSError:
                return

    def held(self, rest: str) -> None:
        self.gate.wait(60)
        self.good(rest)

    def large(self, rest: str) -> None:
        self.send(b"x", length=30_000)

    def endless(self, rest: str) -> None:
        """No length, more than allowed."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"x" * 30_000)
        self.close_connection = True

    def busy(self, rest: str) -> None:
        self.send(b"", 503) if self.hits[self.path] == 1 else self.good(rest)

    def overloaded(self, rest: str) -> None:
        self.send(b"", 503, Retry_After="0")

    def moved(self, rest: str) -> None:
        self.send(b"", 302, Location="/good/3")

    def inside(self, rest: str) -> None:
        self.send(b"", 302, Location="file:///etc/hosts")

    def loop(self, rest: str) -> None:
        self.send(b"", 302, Location="/loop/0")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site():
    """(address, hits by path, gate that `slow` and `held` wait for)"""
    Site.hits, Site.gate = Counter(), threading.Event()
    server = Server(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Site.hits, Site.gate
    Site.gate.set()
    server.shutdown()
    server.server_close()


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_every_address_is_fetched_or_lost_for_a_reason(site, tmp_path):
    base, hits, _ = site
    expected = {
        "good/0": ("ok", ""), "good/7%20a b ü": ("ok", ""), "busy/1": ("ok", ""), "moved/0": ("ok", ""), "gone/0": ("dead", "HTTP 404"),
        "overloaded/0": ("dead", "HTTP 503"), "page/0": ("corrupt", "image is a web page"),
        "broken/0": ("corrupt", "image cut short"), "short/0": ("corrupt", "answer cut short"),
        "large/0": ("too_large", "more bytes than allowed"), "endless/0": ("too_large", "more bytes than allowed"),
        "inside/0": ("dead", "redirect refused"), "loop/0": ("dead", "redirect refused"),
    }  # fmt: skip
    other = {"file:///etc/hosts": "not an http address", "ftp://127.0.0.1/a.jpg": "not an http address", "good/0": "not an http address",
             "http://[::1": "not an http address", f"http://127.0.0.1:{closed_port()}/x": "connection refused"}  # fmt: skip
    urls = [f"{base}/{path}" for path in expected]
    made = download([*urls, *other, urls[0]], tmp_path, QUICK, workers=16)
    assert {path: (made[url]["status"], made[url]["reason"]) for path, url in zip(expected, urls)} == expected
    assert {url: made[url]["reason"] for url in other} == other and len(made) == len(urls) + len(other)
    for url in urls:
        file = tmp_path / image_path(url)
        assert file.exists() == (made[url]["status"] == "ok")
        if file.exists():
            content = file.read_bytes()
            assert (made[url]["sha256"], made[url]["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    assert (tmp_path / image_path(urls[3])).read_bytes() == picture(3)
    assert hits["/overloaded/0"] == hits["/short/0"] == 2 and hits["/gone/0"] == hits["/page/0"] == 1
    assert read_state(tmp_path) == made
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and p.name.startswith(".")) == []


def test_an_answer_that_never_ends_is_given_up(site, tmp_path):
    base, hits, _ = site
    made = download([f"{base}/slow/0"], tmp_path, Limits(timeout=0.4, retries=1, pause=0.01))
    assert made[f"{base}/slow/0"]["reason"] == "timeout" and hits["/slow/0"] == 2


def test_the_same_again_asks_only_for_what_is_not_settled(site, tmp_path, monkeypatch):
    base, hits, _ = site
    monkeypatch.setattr(downloader, "CHUNK", 2)
    urls = [f"{base}/good/{k}" for k in range(5)] + [f"{base}/gone/0"]
    download(urls[:3] + urls[5:], tmp_path, QUICK)
    with (tmp_path / downloader.STATE).open("a") as file:
        file.write('{"url": "torn')  # a killed writer
    (tmp_path / image_path(urls[0])).unlink()
    made = download(urls, tmp_path, QUICK)
    assert hits == {"/good/0": 2, **{f"/good/{k}": 1 for k in range(1, 5)}, "/gone/0": 1}
    assert [made[url]["status"] for url in urls] == ["ok"] * 5 + ["dead"]
    assert read_state(tmp_path) == made
    download(urls, tmp_path, QUICK, again=True)
    assert hits["/gone/0"] == 2 and hits["/good/1"] == 1


def test_killed_and_started_again_fetches_nothing_twice(site, tmp_path):
    base, hits, gate = site
    urls = [f"{base}/good/{k}" for k in range(4)] + [f"{base}/held/4", f"{base}/good/5"]
    release = parquet(tmp_path / "pixmo-cap" / "data" / "train-0.parquet", pixmo_table(urls))
    images = tmp_path / "pixmo-cap" / "images"
    command = [sys.executable, "-m", "datasets_ray.download", str(release), "--images", str(images), "--plain", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not hits["/held/4"] and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert hits["/held/4"] == 1 and not hits["/good/5"]
    gate.set()
    assert main([str(release.parent), "--images", str(images), "--plain", "--workers", "2"]) == 0
    assert [hits[f"/good/{k}"] for k in (0, 1, 2, 3, 5)] == [1] * 5 and hits["/held/4"] == 2
    assert sum(p.is_file() for p in images.rglob("*")) == len(urls) + 1
    manifest, rows = make(SPEC, tmp_path, tmp_path / "out")
    assert len(rows) == manifest["records"] == 6 and not manifest["dropped"]


def test_rows_hold_the_caption_alone_and_what_is_lost_says_why(tmp_path, capsys):
    urls = [f"http://photos.example/{k}.jpg" for k in range(6)]
    images = tmp_path / "pixmo-cap" / "images"
    for url in urls[:3]:
        put(images / image_path(url), picture(format="PNG"))
    reasons = {urls[3]: "HTTP 404", urls[4]: "image is a web page"}
    lost = [{"url": url, "status": "dead", "reason": reason} for url, reason in reasons.items()]
    (images / downloader.STATE).write_text("".join(json.dumps(record) + "\n" for record in lost))
    captions = ["one.  Two\n", "two", None, "four", "five", "six"]
    table = pixmo_table(urls, captions)
    parquet(tmp_path / "pixmo-cap" / "data" / "train-0.parquet", table.slice(0, 4), row_group_size=3)
    parquet(tmp_path / "pixmo-cap" / "data" / "train-1.parquet", table.slice(4))
    manifest, rows = make(SPEC, tmp_path, tmp_path / "out")
    assert [r["id"] for r in rows] == ["pixmo-cap-000000", "pixmo-cap-000001"]
    assert rows[0]["messages"] == [{"role": "user", "text": "<image>"}, {"role": "assistant", "text": "one.  Two\n"}]
    assert rows[1]["images"] == [{"bytes": None, "path": image_path(urls[1])}] and json.loads(rows[1]["meta"])["url"] == urls[1]
    assert manifest["dropped"] == {
        "no caption": 1, "image missing: HTTP 404": 1, "image missing: image is a web page": 1, "image missing: not downloaded": 1,
    }  # fmt: skip
    assert manifest["records"] == 6 and manifest["root"] == str(images)


def test_the_command_counts_and_names_mistakes(site, tmp_path, capsys):
    base, _, _ = site
    release = parquet(tmp_path / "a.parquet", pixmo_table([f"{base}/good/1", f"{base}/gone/1", f"{base}/gone/2", f"{base}/good/1"]))
    assert main([str(release), "--images", str(tmp_path / "images"), "--plain"]) == 0
    assert capsys.readouterr().out == "3 addresses: 2 dead, 1 ok\n          2 dead: HTTP 404\n"
    for arguments, told in [
        ([str(tmp_path / "none.parquet"), "--images", "x"], "no Parquet file"),
        ([str(release), "--images", "x", "--retries", "-1"], "isn't negative"),
        ([str(release), "--images", "x", "--column", "url"], "no column 'url' .*image_url"),
        ([str(release), "--images", str(release / "x"), "--plain"], "can't be written"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=told):
            main(arguments)


def test_mistakes_in_a_release_are_named(tmp_path):
    with pytest.raises(UserError, match="no files for source 'pixmo'"):
        make(SPEC, tmp_path, tmp_path / "out")
    file = parquet(tmp_path / "pixmo-cap" / "data" / "0.parquet", pixmo_table(["http://a.example/1"]))
    with pytest.raises(UserError, match=r"no folder for 'images'.*\n.*python -m datasets_ray\.download"):
        make(SPEC, tmp_path, tmp_path / "out")
    (tmp_path / "pixmo-cap" / "images").mkdir()
    with pytest.raises(UserError, match="no part 'transcripts'"):
        make({**SPEC, "part": "transcripts"}, tmp_path, tmp_path / "out")
    whole = file.read_bytes()
    for data, told in [(whole[:-20], r"0\.parquet can't be read"), (b"", "is empty"), (BROKEN["page.jpg"][0], "is a web page, not")]:
        file.write_bytes(data)
        with pytest.raises(UserError, match=told):
            make(SPEC, tmp_path, tmp_path / "out")
    parquet(file, pa.table({"image_url": ["x"], "text": ["y"]}))
    with pytest.raises(UserError, match="no column 'caption' .*text: string"):
        make(SPEC, tmp_path, tmp_path / "out")
