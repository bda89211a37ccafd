"""`finegrid COMMAND ...`: one word in front of every command of the house. Nothing is imported before its command is asked for.

finegrid plan experiments/full_ablation.yaml      the same as   python -m grid.plan experiments/full_ablation.yaml
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from datasets_ray.errors import UserError, nearest
from grid import options

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("grid.run", "run a study: train, evaluate, report; again to go on"),
    "plan": ("grid.plan", "arms, stage graph, batch arithmetic, GPU-hours, memory, disk; writes nothing"),
    "check": ("grid.check", "numbered preflight: every failure at once, each with its way out"),
    "status": ("grid.status", "where a run stands"),
    "report": ("grid.report", "tables, figures and effects of a run, or of the published table"),
    "look": ("grid.look", "a row's journey: raw, prompt, tokens, loss mask, pack"),
    "keys": ("grid.keys", "every key of study and profile files, with its meaning"),
    "mine": ("trainers.mine", "image-label similarities of a CLIP, cached by identity"),
    "evaluate": ("trainers.evaluate", "one model on benchmarks"),
    "export": ("trainers.export", "a finished arm as a Hugging Face directory"),
    "download": ("datasets_ray.download", "fetch the images that a data set only names: resumes, checks, records what is dead"),
    "choices": ("datasets_ray.choices", "multiple-choice sets from similarities or annotations"),
    "benchmarks": ("datasets_ray.benchmarks", "the benchmarks that ship, as a table"),
    "answers": ("datasets_ray.answers", "what an answer rule makes of an answer"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:10}{told}" for name, (_, told) in COMMANDS.items())
    return f"usage: finegrid COMMAND ...\n\n{rows}\n\nfinegrid COMMAND --help tells more; python -m grid.plan is finegrid plan, and so on."


def dispatch(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names with the rest of the words."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] not in COMMANDS:
        raise UserError(f"no command {words[0]!r}", hint=nearest(words[0], COMMANDS))
    return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:]) or 0


def main(argv: Sequence[str] | None = None) -> None:
    """Console script: leaves the process with the command's exit code."""
    options.run(dispatch, argv)


if __name__ == "__main__":
    main()
