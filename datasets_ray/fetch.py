"""One image from its address: what `datasets_ray.download` does in its threads.

In: an address and `Limits`. Out: the image under the hash of its address, and a record {url, status, reason, sha256, bytes}. The reason is
a short phrase with few values, so that it can be counted by.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from datasets_ray.images import MAX_BYTES, verdict

BLOCK = 1 << 16
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP answers that may be another one later."""
LONGEST_PAUSE = 30.0
AGENT = "Mozilla/5.0 (compatible; finegrid)"


@dataclass(frozen=True)
class Limits:
    """timeout: seconds one attempt may take. retries: further attempts. pause: seconds before the first of them, doubled each time."""

    timeout: float = 20.0
    retries: int = 3
    max_bytes: int = MAX_BYTES
    pause: float = 1.0


class _Lost(Exception):
    """This image won't come. status and reason as in the record; again: another attempt may help, after `pause` seconds if given."""

    def __init__(self, status: str, reason: str, *, again: bool = False, pause: float | None = None) -> None:
        self.status, self.reason, self.again, self.pause = status, reason, again, pause
        super().__init__(reason)


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _must_be_http(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """http and https, proxies of the environment, errors and redirects: no files, no ftp, no data addresses."""
    opener = urllib.request.OpenerDirector()
    kinds = (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, urllib.request.UnknownHandler,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor, _Redirects,
    )  # fmt: skip
    for kind in kinds:
        opener.add_handler(kind())
    return opener


def _must_be_http(url: str) -> None:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in {"http", "https"} and bool(parts.hostname)
    except ValueError:
        fine = False
    if not fine:
        raise _Lost("dead", "not an http address")


def image_path(url: str) -> str:
    """Where the image of an address lies in the downloader's folder: 256 folders of some thousands each."""
    digest = hashlib.sha256(url.encode()).hexdigest()
    return f"{digest[:2]}/{digest}"


class Fetch:
    """`fetch(url) -> record`; picklable. Raises OSError when the folder can't be written, and nothing else."""

    def __init__(self, images: Path, limits: Limits) -> None:
        self.images, self.limits = images, limits

    def __call__(self, url: str) -> dict[str, Any]:
        target = self.images / image_path(url)
        if target.is_file():
            return _kept(url, target.read_bytes())
        try:
            data = self._attempts(url)
            if reason := verdict({"bytes": data}):
                raise _Lost("too_large" if reason == "image too large" else "corrupt", reason)
        except _Lost as lost:
            return {"url": url, "status": lost.status, "reason": lost.reason, "sha256": None, "bytes": None}
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            unfinished.write_bytes(data)
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
        return _kept(url, data)

    def _attempts(self, url: str) -> bytes:
        _must_be_http(url)
        for attempt in range(self.limits.retries + 1):
            try:
                return _get(url, self.limits)
            except _Lost as lost:
                if not lost.again or attempt == self.limits.retries:
                    raise
                time.sleep(min(LONGEST_PAUSE, lost.pause if lost.pause is not None else self.limits.pause * 2**attempt))
        raise AssertionError("unreachable")


def _kept(url: str, data: bytes) -> dict[str, Any]:
    return {"url": url, "status": "ok", "reason": "", "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _get(url: str, limits: Limits) -> bytes:
    """The body of one answer. Raises _Lost."""
    deadline = time.monotonic() + limits.timeout
    asked = quote(url, safe="%/:=&?~#+!$,;'@()*[]|")  # addresses of releases hold spaces and letters beyond ASCII
    try:
        request = urllib.request.Request(asked, headers={"User-Agent": AGENT, "Accept": "image/*,*/*;q=0.5"})
        with _opener().open(request, timeout=limits.timeout) as answer:
            return _body(answer, limits, deadline)
    except urllib.error.HTTPError as error:
        error.close()
        reason = "redirect refused" if 300 <= error.code < 400 else f"HTTP {error.code}"
        raise _Lost("dead", reason, again=error.code in AGAIN, pause=_asked_pause(error.headers)) from None
    except urllib.error.URLError as error:
        raise _connection(error.reason if isinstance(error.reason, Exception) else error) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _connection(error) from None


def _body(answer: Any, limits: Limits, deadline: float) -> bytes:
    """Reads as it comes, so that neither a slow nor an endless answer holds the thread."""
    length = answer.headers.get("Content-Length") or ""
    promised = int(length) if length.isdecimal() else None
    if promised is not None and promised > limits.max_bytes:
        raise _Lost("too_large", "more bytes than allowed")
    data = bytearray()
    while promised is None or len(data) < promised:  # a server that keeps the connection open sends no end
        if not (block := answer.read1(BLOCK)):
            break
        data += block
        if len(data) > limits.max_bytes:
            raise _Lost("too_large", "more bytes than allowed")
        if time.monotonic() > deadline:
            raise _Lost("dead", "timeout", again=True)
    if promised is not None and len(data) < promised:
        raise _Lost("corrupt", "answer cut short", again=True)
    return bytes(data)


def _asked_pause(headers: Message | None) -> float | None:
    """Seconds that a busy server asks for."""
    asked = str(headers.get("Retry-After") or "") if headers is not None else ""
    return float(asked) if asked.isdecimal() else None


def _connection(error: Exception) -> _Lost:
    """What went wrong before there was an answer."""
    if isinstance(error, _Lost):
        return error
    if isinstance(error, TimeoutError):
        return _Lost("dead", "timeout", again=True)
    if isinstance(error, socket.gaierror):
        return _Lost("dead", "no such host", again=True)
    if isinstance(error, ssl.SSLError):
        return _Lost("dead", "TLS error")
    if isinstance(error, ConnectionRefusedError):
        return _Lost("dead", "connection refused", again=True)
    if isinstance(error, (http.client.InvalidURL, ValueError)) and not isinstance(error, UnicodeError):
        return _Lost("dead", "not an http address")
    return _Lost("dead", "connection lost", again=True)
