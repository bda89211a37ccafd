"""What all commands share: study and profile flags, and how a user's mistake ends a command (message, exit 1, no traceback)."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from datasets_ray import errors
from datasets_ray.errors import UserError

SETTING = re.compile(r"[A-Za-z_][\w.+-]*=")
"""A word that goes on with the settings of a `--set` before it; a study's path with `=` in a folder's name has a slash before that."""


class Parser(errors.Parser):
    """Takes `--set A=1 B=2` as well as `--set A=1 --set B=2`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words: list[str] = []
        settings = False
        for word in sys.argv[1:] if args is None else args:
            if settings and words[-1] != "--set" and SETTING.match(word):
                words.append("--set")
            settings = word == "--set" or (settings and not word.startswith("-") and words[-1] == "--set")
            words.append(word)
        return super().parse_known_args(words, namespace)


def parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """An argument parser whose help is the module's docstring."""
    return Parser(prog=f"python -m {command}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def study(to: argparse.ArgumentParser) -> None:
    """STUDY.yaml, --profile, --arms and --set."""
    to.add_argument("study", metavar="STUDY.yaml", help="the study file")
    to.add_argument("--profile", metavar="NAME|FILE", help="scale to run at; default: FINEGRID_PROFILE, else tiny")
    to.add_argument("--arms", metavar="GLOB", nargs="+", action="extend", default=[], help="only arms whose names match")
    to.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="set a dotted key of study or profile (repeatable)")


def simulation(to: argparse.ArgumentParser) -> None:
    """--simulate and what goes with it (grid.simulate)."""
    group = to.add_argument_group("simulation")
    group.add_argument(
        "--simulate", metavar="NODESxGPUS[:FAILURES]", action="append", default=[],
        help="play the plan on such a cluster instead of printing it (cores in place of GPUs for a CPU profile); FAILURES: of nodes a day, "
        "all together (repeatable)",
    )  # fmt: skip
    group.add_argument("--measured", metavar="RUN", help="stage times as this run directory has them, not from the FLOP model")
    group.add_argument("--price", metavar="AMOUNT", type=float, help="of a GPU-hour: the whole cluster is paid from start to end")
    group.add_argument(
        "--assume", metavar="KEY=VALUE", action="append", default=[],
        help="what the plan doesn't say: start_seconds, restart_seconds, stage_seconds, gib_per_second, seed (repeatable)",
    )  # fmt: skip


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> None:
    """Runs a command and leaves the process: 0 or the command's code, 1 for a user's mistake, 130 when interrupted."""
    try:
        code = main(argv)
        sys.stdout.flush()
    except UserError as error:
        print(error, file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
