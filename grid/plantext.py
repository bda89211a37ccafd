"""A plan for people: plan.json and the loaded study in, tables as text out (`grid.plan` without --json)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from grid.features import MB
from grid.load import Loaded

MOST = 60
"""Longest table; what is left out is counted and `--json` has it."""


def render(plan: dict[str, Any], loaded: Loaded) -> str:
    """Everything `grid.plan` prints after the profile's line."""
    study = plan["study"]
    head = [f"{study['name']}: {study['question']}"]
    if study["miniature"]:
        head.append("MINIATURE: sizes, data and rates are this profile's; nothing here compares with published numbers.")
    if study["batch_scale"] != 1:
        head.append(f"BATCHES SCALED by {scale(study['batch_scale'])}: a training step holds that share of the recipe's samples.")
    if study["allow_subset"]:
        head.append(f"SUBSETS ALLOWED: fewer records than published are no error for {', '.join(study['allow_subset'])}.")
    parts = [
        "\n".join(head), _arms(plan), _stages(plan), _training(plan), _features(plan), _evaluation(plan), _totals(plan), _scaled(study),
        _assumptions(study),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], most: int = MOST) -> str:
    """Columns aligned, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows[:most]]
    widths = [max(len(head[i]), *(len(row[i]) for row in cells)) if cells else len(head[i]) for i in range(len(head))]
    right = [
        all(not isinstance(row[i], str) or row[i][:1].isdigit() or row[i] in ("", "-") for row in rows[:most]) for i in range(len(head))
    ]
    lines = [[head[i].rjust(widths[i]) if right[i] else head[i].ljust(widths[i]) for i in range(len(head))]]
    lines += [[row[i].rjust(widths[i]) if right[i] else row[i].ljust(widths[i]) for i in range(len(head))] for row in cells]
    text = "\n".join("  " + "  ".join(line).rstrip() for line in lines)
    return text + (f"\n  ... and {len(rows) - most:,} more (--json lists all)" if len(rows) > most else "")


def big(number: float) -> str:
    """1.23e9 → 1.23 G."""
    for unit in ("", "k", "M", "G", "T", "P", "E", "Z"):
        if abs(number) < 1000 or unit == "Z":
            return f"{number:.3g} {unit}".rstrip()
        number /= 1000
    raise AssertionError


def hours(number: float) -> str:
    """Device time; short ones in seconds or minutes."""
    seconds = number * 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{number:,.1f} h"


def scale(factor: float) -> str:
    """1/64 for 0.015625."""
    return f"1/{round(1 / factor)}" if factor < 1 and (1 / factor).is_integer() else f"{factor:g}"


def flow(value: Any) -> str:
    """A value as one would write it in YAML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _arms(plan: dict[str, Any]) -> str:
    cost = {stage["id"]: stage["cost"]["gpu_hours"] for stage in plan["stages"]}
    entries = [*plan["arms"], *plan["references"]]
    if not entries:
        return ""
    axes = list(entries[0]["axes"])
    foreign = {stage["id"] for stage in plan["stages"] if (stage["spec"].get("model") or {}).get("family") == "existing"}
    rows = []
    for entry in entries:
        start = entry["released"] + (" (stand-in)" if entry["stands_in"] else "") if entry["released"] else entry["init"]
        total = hours(sum(cost[id] for id in entry["stages"])) + " without its answers" * bool(foreign.intersection(entry["stages"]))
        rows.append([entry["name"], *(entry["axes"][axis] for axis in axes), start, len(entry["stages"]), total])
    title = f"Arms: {len(plan['arms']):,} trained, {len(plan['references'])} reference(s). Cost of one alone, nothing shared:"
    note = "\n  without its answers: what transformers' generate takes for a released model is not estimated" if foreign else ""
    return title + "\n" + table(["arm", *axes, "init", "stages", "device"], rows) + note


def _stages(plan: dict[str, Any]) -> str:
    counted = ", ".join(f"{count:,} {kind}" for kind, count in plan["totals"]["by_kind"].items())
    shared = [stage for stage in plan["stages"] if len(stage["arms"]) > 1 and stage["kind"] == "train"]
    lines = [f"Stages: {len(plan['stages']):,} ({counted}). Each runs once. Trained once for several arms:"]
    rows = [[stage["name"], len(stage["arms"]), stage["id"]] for stage in shared]
    return (
        "\n".join([*lines, table(["stage", "arms", "identity"], rows)])
        if shared
        else lines[0].replace(" Trained once for several arms:", "")
    )


def _training(plan: dict[str, Any]) -> str:
    rows = []
    for stage in plan["stages"]:
        if stage["kind"] != "train":
            continue
        cost, spec, runtime = stage["cost"], stage["spec"], stage["runtime"]
        memory = f"{cost['memory_gib']:.2f}"
        epochs = f"{spec['epochs']:g} epoch" if "epochs" in spec else f"{spec['steps']} steps"
        again = " recompute" * bool(runtime["activation_checkpointing"]) + " offload" * bool(runtime["offload"])
        rows.append([
            stage["name"], f"{cost['rows']:,}", epochs, spec["batch"], f"{cost['steps']:,}", f"{cost['samples']:,}", big(cost["tokens"]),
            "+".join(f"{part} (LoRA)" if part in spec.get("adapters", {}) else part for part in cost["trainable"]),
            big(cost["flops"]), hours(cost["gpu_hours"]), memory, f"{runtime['zero']}{again}",
            f"{runtime['micro_tokens']:,}", f"{cost['disk_gib']:.3f}",
        ])  # fmt: skip
    head = [
        "training", "rows", "for", "batch", "steps", "samples", "tokens", "trains", "FLOPs", "device", "GiB each", "ZeRO", "micro",
        "GiB kept",
    ]  # fmt: skip
    title = "Batch arithmetic and estimates (steps = rows x epochs / batch, the last partial batch counts):\n"
    return title + table(head, rows) if rows else ""


def _features(plan: dict[str, Any]) -> str:
    rows = []
    for entry in plan["features"]:
        fit = entry["image"]["fit"]
        verdict = "pays, kept" if entry["kept"] else "pays, no room" if entry["pays"] else "doesn't pay"
        verdict = "doesn't: under ZeRO 3 all ranks run the encoder together" if entry["together"] else verdict
        rows.append([
            f"{entry['encoder']} x {entry['rows']} ({fit})", f"{entry['flops_share']:.1%} of FLOPs", f"{entry['bytes'] / 1e9:.2f} GB",
            f"read {entry['readings']:.3g} x", f"saves {hours(entry['saves'] / 3600)}", f"costs {hours(entry['costs'] / 3600)}", verdict,
        ])  # fmt: skip
    if not rows:
        return ""
    room = plan["run"]["features_mb"]
    pays = sum(entry["bytes"] for entry in plan["features"] if entry["pays"])
    lines = [f"Outputs of frozen encoders, kept on one machine's disk or made again, in a device's time (features_mb: {room:,}):"]
    lines += [f"  {'; '.join(row[:2])}, {', '.join(row[2:6])}: {row[6]}" for row in rows[:MOST]]
    if len(rows) > MOST:
        lines.append(f"  ... and {len(rows) - MOST:,} more (--json lists all)")
    if pays > room * MB:
        lines.append(f"  features_mb: {-(-pays // MB):,} has room for all that pays")
    return "\n".join(lines)


def _evaluation(plan: dict[str, Any]) -> str:
    by_benchmark: dict[str, list[int]] = {}
    for entry in [*plan["arms"], *plan["references"]]:
        for name in entry["scores"]:
            by_benchmark.setdefault(name, []).append(1)
    if not by_benchmark:
        return ""
    samples = {stage["id"]: stage["cost"]["samples"] for stage in plan["stages"]}
    first = [*plan["arms"], *plan["references"]][0]
    groups = {name: group for group, names in plan["groups"].items() for name in names}
    rows = [[name, groups.get(name, "-"), f"{samples[first['predictions'][name]]:,}", len(models)] for name, models in by_benchmark.items()]
    text = "Questions:\n" + table(["benchmark", "group", "questions", "models"], rows)
    controls = [f"{entry['name']} ({', '.join(entry['controls'])})" for entry in plan["arms"] if entry["controls"]]
    return text + (f"\n  control, images permuted among questions: {'; '.join(controls)}" if controls else "")


def _totals(plan: dict[str, Any]) -> str:
    totals = plan["totals"]
    device = totals["device"]
    lines = [
        f"Totals, assuming {device['mfu']:.0%} of {device['tflops']:g} TFLOP/s of {device['name']}:",
        f"  {big(totals['flops'])}FLOP, {hours(totals['gpu_hours'])} of one device; "
        f"arm by arm without sharing {hours(totals['gpu_hours_without_sharing'])}",
        f"  largest stage {totals['memory_gib']:.2f} GiB of {device['memory_gib']:g} GiB a device"
        + (f", {totals['host_gib']:.2f} GiB of its host" if totals["host_gib"] else "")
        + ("" if totals["fits"] else ": DOES NOT FIT"),
        f"  {totals['disk_gib']:.2f} GiB kept, {totals['work_gib']:.2f} GiB more for the largest stage's checkpoints",
    ]
    if paper := totals.get("paper"):
        each, most = paper["devices"] * paper["hours"], paper["gpu_hours_at_most"]
        lines.append(
            f"  the paper: {paper['devices']} x {paper['device']}, up to {paper['hours']:g} h an arm = {each:,.0f} device hours an arm, "
            f"{most:,.0f} for {totals['arms']} arms"
        )
        if "planned" in paper:
            lines.append(
                f"  this plan on {paper['device']}: {paper['planned']:,.0f} device hours for everything, "
                f"{paper['planned_longest_arm']:,.0f} for the longest arm alone, {paper['planned_each']:,.0f} for all arms one by one"
            )
    return "\n".join(lines)


def _scaled(study: dict[str, Any]) -> str:
    if not study["scaled"]:
        return ""
    rows = [f"  {entry['key']}: {flow(entry['study'])} -> {flow(entry['here'])} ({entry['where']})" for entry in study["scaled"]]
    return "Different from the study file:\n" + "\n".join(rows)


def _assumptions(study: dict[str, Any]) -> str:
    lines = []
    if study["assumptions"]:
        lines.append("Assumptions where the source is silent:")
        for entry in study["assumptions"]:
            lines += textwrap.wrap(
                f"{entry['key']} = {flow(entry['value'])}: {entry['text']}", 130, initial_indent="  - ", subsequent_indent="    "
            )
    if study["notices"]:
        lines.append(f"{study['compatibility']}, and what still differs from it:")
        lines += [f"  - {notice}" for notice in study["notices"]]
    if study["doubts"]:
        lines += ["doubtful:", *(f"  - {doubt}" for doubt in study["doubts"])]
    return "\n".join(lines)
