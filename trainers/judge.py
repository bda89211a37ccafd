"""A judge model behind an OpenAI-compatible endpoint: conversations in, its replies out, each asked once and kept on disk.

    judge = Judge.of({"url": "http://127.0.0.1:8000/v1", "model": "qwen2.5-72b", "key_env": None, "cache": "judged"})
    replies = judge.ask([[{"role": "user", "content": "..."}], ...])

Standard library only. Temperature 0; at most `concurrency` questions are open at a time; what may pass (timeouts, lost connections, 429
and 5xx) is tried again, later each time. A reply lies in `cache` under the hash of model and conversation as soon as it is there, so that
a killed run asks only for the rest. The key is read from the environment variable `key_env` when it is sent, and goes nowhere else: it is
taken out of error messages, redirects are not followed with it, and a URL that holds one is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from datasets_ray.errors import UserError, nearest

Conversation = Sequence[Mapping[str, str]]
PASSING = (408, 409, 425, 429)
"""HTTP answers besides 5xx after which the same question may succeed."""
REFUSED = (400, 413, 422)
"""HTTP answers that mean this question, not the next one: a content filter, too long a text."""
LONGEST = 60.0
"""Seconds between two attempts at most."""


@dataclass(frozen=True)
class Reply:
    text: str
    """Empty where there was none to this question; `why` says the reason, and it is asked again the next time."""
    model: str
    """What the endpoint says that it is; the requested name where it doesn't."""
    why: str = ""


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *given: Any) -> None:
        return None  # the key must not follow to another host


@dataclass(frozen=True)
class Judge:
    """An endpoint and how it is asked."""

    url: str
    model: str
    key_env: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    """Seconds for one reply."""
    attempts: int = 6
    wait: float = 1.0
    """Seconds before the second attempt; doubled for each further one."""
    cache: Path | None = field(default=None)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Judge:
        """url and model, and where they differ from the defaults the other fields by name. Raises UserError."""
        unknown = sorted(set(given) - {"url", "model", "key_env", "concurrency", "timeout", "attempts", "wait", "cache"})
        if unknown:
            raise UserError(f"judge: unknown key {unknown[0]!r}", hint=nearest(unknown[0], cls.__dataclass_fields__))
        for name in ("url", "model"):
            if not given.get(name) or not isinstance(given[name], str):
                raise UserError(f"judge: no {name}", hint="judge: {url: http://127.0.0.1:8000/v1, model: NAME, key_env: OPENAI_API_KEY}")
        if wrong := wrong_url(given["url"]):
            raise UserError(f"judge: {wrong}", hint="url: http://127.0.0.1:8000/v1")
        made = {name: value for name, value in given.items() if value is not None}
        cache = made.pop("cache", None)
        judge = cls(**made, cache=Path(cache) if cache is not None else None)
        if judge.concurrency < 1 or judge.attempts < 1 or judge.timeout <= 0 or judge.wait < 0:
            raise UserError("judge: concurrency and attempts are 1 or more, timeout is above 0 and wait not below it")
        return judge

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    def ask(self, conversations: Sequence[Conversation], max_tokens: int = 64) -> list[Reply]:
        """A reply for each, in their order; equal ones are asked once. ConnectionError or TimeoutError after the last attempt (what was
        answered until then is kept), UserError where asking again can't help or no question at all was answered."""
        bodies = {self._name(one, max_tokens): self._body(one, max_tokens) for one in conversations}
        known = {name: reply for name in bodies if (reply := self._kept(name)) is not None}
        waiting = [name for name in bodies if name not in known]
        if waiting:
            key = self._key()
            with ThreadPoolExecutor(min(self.concurrency, len(waiting))) as pool:
                futures = {name: pool.submit(self._one, name, bodies[name], key) for name in waiting}
                try:
                    known |= {name: future.result() for name, future in futures.items()}
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        if known and not any(reply.text for reply in known.values()):
            why = next(iter(known.values())).why
            hint = "a judge that thinks before it answers has no tokens left for it: turn that off, or take another model"
            raise UserError(f"the judge {self.model} at {self.host} answers nothing", why=why, hint=hint)
        return [known[self._name(one, max_tokens)] for one in conversations]

    # ── one question ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _body(self, conversation: Conversation, max_tokens: int) -> bytes:
        messages = [dict(message) for message in conversation]
        return json.dumps({"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}).encode()

    def _name(self, conversation: Conversation, max_tokens: int) -> str:
        """What is asked, without where: another endpoint with the same model has the same answers."""
        return hashlib.sha256(self._body(conversation, max_tokens)).hexdigest()

    def _key(self) -> str:
        if self.key_env is None:
            return ""
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            why = "the judge's key is read there"
            raise UserError(f"environment variable {self.key_env} is empty", why=why, hint=f"export {self.key_env}=..., on every machine")
        if not key.isascii() or not key.isprintable() or " " in key:
            why = "it has white space or characters that no header takes"
            raise UserError(f"environment variable {self.key_env} holds no key", why=why)
        return key

    def _one(self, name: str, body: bytes, key: str) -> Reply:
        for attempt in range(self.attempts):
            try:
                reply = self._sent(body, key)
                if reply.text:
                    self._keep(name, reply)
                return reply
            except _Passing as error:
                if attempt + 1 == self.attempts:
                    what = f"the judge at {self.host} gave no answer in {self.attempts} attempts: {_without(key, str(error))}"
                    raise (TimeoutError if error.slow else ConnectionError)(what) from None
                time.sleep(min(LONGEST, max(self.wait * 2**attempt, error.wait)))
        raise AssertionError("unreachable")

    def _sent(self, body: bytes, key: str) -> Reply:
        url = self.url.rstrip("/")
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(url, data=body, headers=headers, method="POST")
        try:
            with urllib.request.build_opener(_Stay).open(request, timeout=self.timeout) as answer:
                given = json.loads(answer.read())
            choice = given["choices"][0]
            said = _without(key, str(choice["message"].get("content") or "").strip())
            why = "" if said else f"an empty reply, finish_reason {choice.get('finish_reason')!r}"
            return Reply(said, str(given.get("model") or self.model), why)
        except urllib.error.HTTPError as error:
            said = _without(key, error.read(2000).decode("utf-8", "replace").strip().replace("\n", " "))[:300]
            if error.code >= 500 or error.code in PASSING:
                raise _Passing(f"HTTP {error.code} {said}", wait=_seconds(error.headers.get("Retry-After"))) from None
            if error.code in REFUSED:
                return Reply("", self.model, f"HTTP {error.code} {said}")
            hint = {401: "the key, in the variable that key_env names", 404: "url ends in /v1; model is a name that the endpoint serves"}
            why = said or str(error.reason)
            raise UserError(f"the judge at {self.host} answers HTTP {error.code}", why=why, hint=hint.get(error.code, "")) from None
        except TimeoutError:
            raise _Passing(f"nothing within {self.timeout:g} s", slow=True) from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            slow = isinstance(getattr(error, "reason", None), TimeoutError)
            raise _Passing(f"{type(error).__name__}: {error}", slow=slow) from None

    # ── what was said ────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _kept(self, name: str) -> Reply | None:
        if self.cache is None:
            return None
        try:
            found = json.loads((self.cache / name[:2] / f"{name}.json").read_text(encoding="utf-8"))
            return Reply(found["text"], found["model"])
        except (OSError, ValueError, LookupError):
            return None  # absent or torn: asked again

    def _keep(self, name: str, reply: Reply) -> None:
        if self.cache is None:
            return
        path = self.cache / name[:2] / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.part")
        torn.write_text(json.dumps({"text": reply.text, "model": reply.model}), encoding="utf-8")
        torn.replace(path)


class _Passing(Exception):
    """Worth another attempt. wait: seconds that the endpoint asks for; slow: it was a timeout."""

    def __init__(self, what: str, wait: float = 0.0, slow: bool = False) -> None:
        super().__init__(what)
        self.wait, self.slow = wait, slow


def wrong_url(url: str) -> str | None:
    """What is wrong with an endpoint's URL, or None."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # read only now
    except ValueError:
        return "url can't be read"
    if not url.isprintable() or " " in url:
        return f"url {url!r} holds a blank"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"url {url!r} is no http(s) address"
    if parts.username or parts.password or parts.query:
        return "url holds a user, a password or a query: a key belongs into the environment variable that key_env names"
    return None


def _without(key: str, text: str) -> str:
    return text.replace(key, "***") if key else text


def _seconds(given: str | None) -> float:
    """Of a Retry-After header; a date counts as none."""
    try:
        return max(0.0, float(given or 0))
    except ValueError:
        return 0.0
