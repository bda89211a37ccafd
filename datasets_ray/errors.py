"""The one exception whose message is meant for the person at the keyboard.

It lives in the lowest room because every room raises it and imports run one way.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake the user can mend: printed without a traceback, exit code 1.

    what: what is wrong, with the value. why: the rule it breaks. hint: what to write instead.
    where: `file:line` or any place the user can open.
    """

    def __init__(self, what: str, *, why: str = "", hint: str = "", where: str = "") -> None:
        self.what, self.why, self.hint, self.where = what, why, hint, where
        super().__init__(self.render())

    def render(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        body = f"{head} ({self.why})" if self.why else head
        return f"{body}\n  hint: {self.hint}" if self.hint else body


class UserErrors(UserError):
    """Several mistakes found in one go, one paragraph each."""

    def __init__(self, errors: Iterable[UserError]) -> None:
        self.errors = list(errors)
        Exception.__init__(self, self.render())

    def render(self) -> str:
        return "\n".join(error.render() for error in self.errors)


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` or the list of what is known: the tail of every unknown-name error."""
    names = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.55)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"known: {shown}" if shown else "nothing is known here"


class Parser(argparse.ArgumentParser):
    """An argument parser whose refusals are `UserError`s: exit code 1 as for any mistake (argparse's 2 means failed arms here)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        words = [word.rstrip(":,") for word in message.split()]
        flag = next((word for word in words if word.startswith("--") and word not in self._option_string_actions), None)
        meant = nearest(flag.partition("=")[0], (o for o in self._option_string_actions if o.startswith("--"))) if flag else ""
        raise UserError(message, hint=f"{meant + ' ' if meant.startswith('did') else ''}{self.prog} --help tells the words")


def run_command(main: Callable[..., int | None], *arguments: object) -> int:
    """What every `python -m` entry wraps its main in: a user's mistake is one message on stderr and exit code 1, Ctrl-C is 130."""
    try:
        return main(*arguments) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
