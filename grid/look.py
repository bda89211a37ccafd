"""A row's journey through an arm: raw → images → prompt → tokens → loss mask → step and pack; and how a question reaches the model.

    python -m grid.look STUDY.yaml --arm NAME [--stage pretrain|finetune|BENCHMARK ...] [--row N] [--out DIR] [--profile ...] [--set ...]

Shows what the stages do, by the functions that they use. Rows come from finished stages (`--out DIR` of a run, or the store);
a data set that no run has made yet is made here, its first rows only, and the text says so. Nothing is kept.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError, nearest
from grid import options
from grid.load import load
from grid.plan import plan

Stage = dict[str, Any]
FIRST = 256
"""Rows made of a data set that no run has made yet."""


class Rows:
    """Dataset stages → directories with rows: finished artefacts, or the first rows made in a temporary place."""

    def __init__(self, stages: dict[str, Stage], store: Path | None, temporary: Path, data_root: str | None, count: int) -> None:
        self.stages, self.store, self.temporary, self.data_root, self.count = stages, store, temporary, data_root, count
        self.made: list[str] = []
        """Names of the sets made here."""

    def __call__(self, id: str) -> Path:
        if self.store is not None and (self.store / id / "DONE.json").is_file():
            return self.store / id
        stage, place = self.stages[id], self.temporary / id
        if stage["kind"] != "dataset":
            hint = "run the study, then give its directory: --out DIR"
            raise UserError(f"{stage['name']} has not run yet", why="its rows come from other stages", hint=hint)
        if not place.is_dir():
            from datasets_ray.sources import build

            spec = stage["spec"]
            place.mkdir(parents=True)
            limited = spec if spec["source"] in ("concat", "permuted") else {**spec, "rows": min(self.count, stage["cost"]["samples"])}
            build(limited, place, self, self.data_root)
            if limited is not spec:
                self.made.append(f"{stage['name'].removeprefix('data ')} ({limited['rows']} of {stage['cost']['samples']:,})")
        return place


def look(planned: dict[str, Any], arm: dict[str, Any], wanted: list[str], row: int, rows: Rows, say: Callable[[str], None]) -> None:
    """Says the journey of row `row` through each wanted stage of the arm: `pretrain`, `finetune` or a benchmark."""
    stages = rows.stages
    trained = {stages[id]["name"].split()[0]: stages[id] for id in own_training(stages, arm)}
    known = [*trained, *arm["predictions"]]
    for name in wanted or list(trained) or known[-1:]:
        if name not in known:
            raise UserError(f"arm {arm['name']} has no stage {name!r}", hint=nearest(name, known))
        stage = trained.get(name) or stages[arm["predictions"][name]]
        say(f"\n═══ {stage['name']}  {stage['id']}\n")
        say(_training(stage, row, rows) if name in trained else _question(stage, row, rows))
    if rows.made:
        say("\nmade for this look, first rows only: " + ", ".join(rows.made))


def own_training(stages: dict[str, Stage], arm: dict[str, Any]) -> list[str]:
    """The arm's pretraining and finetuning, in order; encoders and language models that profiles train are not the arm's."""
    found = [id for id in arm["stages"] if stages[id]["kind"] == "train"]
    return [id for id in found if stages[id]["name"].split()[0] in ("pretrain", "finetune")]


def _training(stage: Stage, row: int, rows: Rows) -> str:
    from datasets_ray.look import journey
    from datasets_ray.pipeline import index_of
    from trainers.objectives import load_objective
    from trainers.train import encoding_of

    spec = stage["spec"]
    directories = [rows(id) for id in spec["data"]["rows"]]
    encoding = encoding_of(spec, load_objective(spec["objective"]))
    index = index_of(
        directories, spec["batch"], epochs=spec.get("epochs"), steps=spec.get("steps"), seed=spec["seed"], order=spec["data"]["order"]
    )
    return journey(directories, encoding, row, index, stage["runtime"]["micro_tokens"])


def _question(stage: Stage, row: int, rows: Rows) -> str:
    from datasets_ray.images import recipe_from_json
    from datasets_ray.questions import prepare
    from datasets_ray.rows import RowTable
    from datasets_ray.tokens import decode_pieces, load_tokenizer

    spec = stage["spec"]
    table, model = RowTable(rows(spec["questions"])), spec["model"]
    if not 0 <= row < len(table):
        raise UserError(f"{stage['name']} has {len(table)} questions", hint=f"--row 0 to {len(table) - 1}")
    recipe = recipe_from_json(spec["image"]) if spec["image"] else None
    prompts = prepare(table, model["tokenizer"], model["template"], recipe, spec["suffix"], bool(spec.get("listed", True)))
    encoded = prompts.encoded[row]
    asked = table[row]
    lines = [f"row {row} of {len(table)}: {asked['id']}, right answer {asked['answer']} ({asked['label']})"]
    if encoded is None:
        lines.append(f"can't be asked; so are {sum(prompts.dropped.values())} rows: {dict(prompts.dropped)}")
    else:
        lines += ["", prompts.prompts[row] or ""]
        lines += ["", f"{len(encoded.ids)} tokens: {' '.join(decode_pieces(encoded.ids, load_tokenizer(model['tokenizer'])))}"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser("grid.look", __doc__)
    options.study(parser)
    parser.add_argument("--arm", required=True, metavar="NAME", help="the arm to look at")
    parser.add_argument("--stage", nargs="+", default=[], metavar="NAME", help="pretrain, finetune or benchmarks; default: both trainings")
    parser.add_argument("--row", type=int, default=0, metavar="N", help="number of the row, counted over the stage's data")
    parser.add_argument("--out", metavar="DIR", help="a run's directory, whose finished rows are shown")
    given = parser.parse_args(argv)
    loaded = load(given.study, given.profile, given.set)
    print(loaded.headline)
    planned = plan(loaded)
    everyone = {arm["name"]: arm for arm in [*planned["arms"], *planned["references"]]}
    if given.arm not in everyone:
        raise UserError(f"no arm {given.arm!r} in {loaded.study.study}", hint=nearest(given.arm, everyone))
    if given.row < 0:
        raise UserError(f"--row {given.row}", why="rows count from 0")
    profile = loaded.profile
    place = profile.store or os.environ.get("FINEGRID_STORE") or (str(Path(given.out) / "store") if given.out else None)
    if given.out and not Path(given.out).is_dir():
        raise UserError(f"no run in {given.out}", hint="give the --out of a grid.run")
    with tempfile.TemporaryDirectory() as directory:
        stages = {stage["id"]: stage for stage in planned["stages"]}
        root = profile.data_root or os.environ.get("FINEGRID_DATA")
        rows = Rows(stages, Path(place) if place else None, Path(directory), root, max(FIRST, given.row + 1))
        look(planned, everyone[given.arm], given.stage, given.row, rows, lambda text: print(text))
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    options.run(main)
