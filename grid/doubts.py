"""What a study may say but most likely doesn't mean: a typed study and its arms in, a sentence for each doubt out. Nothing stops for one.

A contrast that no pair of arms answers; arms that train the same; encoders without a number of their own where benchmarks ask for one;
optimisations turned off.
"""

from __future__ import annotations

from collections.abc import Sequence

from grid import towers
from grid.expand import Arm
from grid.profile import Profile
from grid.study import Contrast, Study
from grid.where import parse_where


def doubts(study: Study, profile: Profile, arms: Sequence[Arm]) -> list[str]:
    """One sentence for each."""
    found = [f"contrast {contrast.name}: {why}" for contrast in study.contrasts if (why := _no_pair(contrast, study, arms))]
    twins: dict[object, Arm] = {}
    for arm in arms:
        if arm.released is None and (twin := twins.setdefault(arm.content, arm)) is not arm:
            differ = ", ".join(axis for axis in study.axes if arm.axes[axis] != twin.axes[axis])
            why = f"their {differ} sets no key of the recipe to another value" if differ else "what one sets is what the other has anyway"
            found.append(f"arms {twin.name} and {arm.name} train the same: {why}")
    found += _silent(study, profile, arms)
    if profile.resources.disable:
        off = ", ".join(profile.resources.disable)
        found.append(f"resources.disable turns off {off}: equal results, later and in more memory than estimated; finished stages stay")
    return found


def _silent(study: Study, profile: Profile, arms: Sequence[Arm]) -> list[str]:
    """Encoders that arms see with and that can't be asked by themselves, where `zeroshot: true` asks them (`Planner.sees_by`)."""
    asked = [name for name, benchmark in study.benchmarks.items() if benchmark.zeroshot]
    seen: dict[str, str] = {}
    for arm in arms if asked else ():
        released, name = profile.models.get(arm.released or ""), arm.recipe.encoder
        existing = released is not None and released.family == "existing"
        if arm.recipe.model is not None or (released is not None and not existing and not arm.stands_in and released.stand_in is None):
            continue  # a whole model's encoder is a part of it
        if name not in seen:
            asset = profile.encoders.get(name)
            seen[name] = "the profile doesn't have it" if asset is None else "" if towers.classifies(asset) else "it has no text tower"
    return [f"encoder {name} isn't asked by itself ({', '.join(asked)}: zeroshot): {why}" for name, why in seen.items() if why]


def _no_pair(contrast: Contrast, study: Study, arms: Sequence[Arm]) -> str | None:
    """Why no two arms differ as a contrast asks, by the rule of `grid.effects.matched_pairs`; None where two do."""
    clauses = parse_where(contrast.where, study.axes)
    chosen = [arm for arm in arms if all(clause.holds(_facts(arm)) for clause in clauses)] if clauses else arms
    if not chosen:
        return f"no arm is where {contrast.where!r}"
    sides = []
    for values in (contrast.from_, contrast.to):
        here = [arm for arm in chosen if arm.axes[contrast.axis] in values.split("|")]
        if not here:
            return f"no arm{f' where {contrast.where}' if contrast.where else ''} has {contrast.axis} {values}"
        rests = [tuple(value for axis, value in arm.axes.items() if axis != contrast.axis) for arm in here]
        trained = {(rest, _beyond(arm, study)) for rest, arm in zip(rests, here) if arm.released is None}
        sides.append((trained, {rest for rest, arm in zip(rests, here) if arm.released is not None}, set(rests)))
    (trained, released, all_), (others, free, everyone) = sides
    if trained & others or released & everyone or free & all_:
        return None
    return f"no two arms differ in {contrast.axis} only, from {contrast.from_} to {contrast.to}"


def _beyond(arm: Arm, study: Study) -> str:
    """What must be equal besides the axes: the start, the seed, and what the arm sets itself."""
    own = {key: value for key, value in (arm.changes or {}).items() if key not in ("init", "seed")}
    return repr((arm.recipe.init, study.seed if arm.recipe.seed is None else arm.recipe.seed, own))


def _facts(arm: Arm) -> dict[str, str]:
    row = "" if arm.row is None else str(arm.row)
    return {**arm.axes, "row": row, "source": arm.source, "init": arm.recipe.init, "name": arm.name}
