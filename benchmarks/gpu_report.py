"""The report of ``scripts/gpu-run``: ``gpu-report.json`` and, for reading, ``gpu-report.md``."""

import json
import os
import time
from pathlib import Path
from typing import Any

TARGET_NATS = 1.4697  # nanoGPT's GPU recipe on tiny Shakespeare, validation
OURS = "ours, CUDA graph"
RIVAL = "plain fp16"  # the only precision in which torch packs cuDNN's weights and the GPU has fast products
RIVAL_GRAPH = "plain fp16, CUDA graph"
SEED_SPEED_UP, MIN_SHARE = 3.0, 0.5

WRONG = "our losses differ from those of plain modules"

Facts = dict[str, Any]


def time_to_target(curve: list[Facts], key: str = "seconds") -> float | None:
    """Seconds until the first validation loss that is at most the target, None if there is none."""
    return next((row[key] for row in curve if row["nats"] is not None and row["nats"] <= TARGET_NATS), None)


def mark(name: str, value: str, reached: bool | None) -> Facts:
    """A claim: reached, not reached, or not measured."""
    state = "not measured" if reached is None else "reached" if reached else "not reached"
    return {"mark": name, "result": state, "value": value}


def marks(report: Facts) -> list[Facts]:
    """The claims that a GPU must show, from the parts of a report that ran."""
    is_gpu = report["device"].get("type") == "cuda" and not report["quick"]
    cases = report.get("benchmarks", {}).get("cases", []) if is_gpu else []
    rows = [seed_mark(cases, cell) for cell in ("rnn", "gru", "lstm")]
    rows += large_marks(find_case(cases, "lstm", 4096, 512))
    return [*rows, training_mark(report if is_gpu else {})]


def find_case(cases: list[Facts], cell: str, units: int, lanes: int) -> Facts:
    """The benchmark of these sizes, empty if it was not run."""
    same = (case for case in cases if (case["cell"], case["units"], case["lanes"]) == (cell, units, lanes))
    return next(same, {})


def seed_mark(cases: list[Facts], cell: str) -> Facts:
    """The speed-up over the fastest of the plain modules, at the sizes of configs/seed.toml."""
    name = f"seed's {cell}: {SEED_SPEED_UP:g} times plain nn modules"
    case = find_case(cases, cell, 256, 32)
    ratios = {
        rival: ratio for rival, ratio in case.get("ratios", {}).items() if rival != RIVAL_GRAPH
    }  # plain loops do not capture it
    if not ratios:
        return mark(name, "", None)
    if is_wrong(case):
        return mark(name, WRONG, False)
    rival, ratio = min(ratios.items(), key=lambda item: item[1]["median"])
    return mark(name, f"{show_ratio(ratio)} times {rival}, the fastest", ratio["median"] >= SEED_SPEED_UP)


def is_wrong(case: Facts) -> bool:
    """Whether our losses are not those of plain modules, so that our speed means nothing."""
    return case.get("variants", {}).get(OURS, {}).get("agrees") is False


def large_marks(case: Facts) -> list[Facts]:
    """The speed relative to cuDNN's fp16 LSTM with packed weights, and the share of the peak."""
    ours, rival = (case.get("variants", {}).get(name, {}) for name in (OURS, RIVAL))
    ratio, share = case.get("ratios", {}).get(RIVAL), ours.get("share")
    speed_name = "LSTM of 4096 units, batch 512: at least cuDNN's fp16 LSTM"
    if not ratio or not rival.get("packed"):
        speed = mark(speed_name, "its weights were not packed" if ratio else "", None)
    else:
        speed = mark(speed_name, f"{show_ratio(ratio)} times", ratio["median"] >= 1)
    if is_wrong(case):
        speed = mark(speed_name, WRONG, False)
    share_name = f"LSTM of 4096 units, batch 512: {MIN_SHARE:.0%} of the measured bf16 peak"
    return [speed, mark(share_name, f"{share:.1%}" if share else "", share >= MIN_SHARE if share else None)]


def training_mark(report: Facts) -> Facts:
    """The seconds from the command to the target, against those of the transformer without its evaluations."""
    name = f"tiny Shakespeare to {TARGET_NATS} nats in less time than nanoGPT's recipe, which is not compiled here"
    ours, rival = report.get("training", {}), report.get("transformer", {})
    seconds, curve = ours.get("seconds_to_target"), rival.get("validation", [])
    if rival.get("status") == "timeout" and seconds and not rival.get("seconds_to_target"):
        trained = rival["seconds"] - max((row.get("evaluation_seconds", 0.0) for row in curve), default=0.0)
        value = f"{seconds:.1f} s; the transformer had not reached it in {trained:.0f} s"
        return mark(name, value, True if seconds < trained else None)
    if not curve or rival.get("status") != "ok" or (not seconds and ours.get("status") != "ok"):
        return mark(name, f"{seconds:.1f} s" if seconds else "", None)
    if not seconds:
        return mark(name, "the target was not reached", False)
    trained = [row | {"training_seconds": row["seconds"] - row.get("evaluation_seconds", 0.0)} for row in curve]
    reached = time_to_target(trained, "training_seconds")
    limit = reached if reached is not None else trained[-1]["training_seconds"]
    note = "" if reached is not None else ", in which it did not reach it"
    return mark(name, f"{seconds:.1f} s, the transformer {limit:.1f} s without its evaluations{note}", seconds < limit)


def show_ratio(ratio: Facts) -> str:
    """A ratio with its interval."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


class Report:
    """The facts of all parts so far; each addition writes both files."""

    def __init__(self, folder: Path, quick: bool, packages: Facts, described: Facts) -> None:
        self.folder = folder
        self.start = time.time()
        self.facts: Facts = {"complete": False, "quick": quick, **described, "packages": packages, "parts": []}
        self.write()

    def add(self, name: str, facts: Facts) -> None:
        """Adds the facts of a part, of which ``status`` is one."""
        self.facts["parts"].append(name)
        self.facts[name] = facts
        self.write()

    def finish(self) -> None:
        """Marks the report as complete."""
        self.facts["complete"] = True
        self.write()

    @property
    def exit_status(self) -> int:
        """1 if a part failed or was cut off."""
        return int(any(self.facts[name]["status"] in ("failed", "timeout") for name in self.facts["parts"]))

    def write(self) -> None:
        """Replaces both files."""
        self.facts["seconds"] = round(time.time() - self.start, 1)
        self.facts["marks"] = marks(self.facts)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_file(self.folder / "gpu-report.json", json.dumps(self.facts, indent=1))
        write_file(self.folder / "gpu-report.md", markdown(self.facts))


def write_file(path: Path, text: str) -> None:
    """Writes a file at once."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    os.replace(partial, path)


def markdown(facts: Facts) -> str:
    """The report for reading."""
    sections = [
        heading(facts), table(["mark", "result", "value"], facts["marks"]), parts_table(facts),
        tests_section(facts.get("tests")), benchmarks_section(facts.get("benchmarks", {})), curves(facts),
        failures(facts),
    ]  # fmt: skip
    return "\n\n".join(section for section in sections if section) + "\n"


def heading(facts: Facts) -> str:
    state = "complete" if facts["complete"] else "not complete: it was cut off, or is running"
    quick = ", `--quick`: small sizes that measure nothing" if facts["quick"] else ""
    device = ", ".join(f"{name} {value}" for name, value in facts["device"].items())
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items() if value)
    packages = facts["packages"]
    lines = [f"# GPU report ({state}, {facts['seconds']:.0f} s{quick})", f"Device: {device}", f"Versions: {versions}"]
    found = [name for name in ("unpacked", "missing", "not used") if packages.get(name)]
    lines += [f"Bundle, {name}: {', '.join(packages[name])}" for name in found]
    return "\n\n".join(lines)


def table(columns: list[str], rows: list[Facts]) -> str:
    """A table of the rows' values in these columns."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: object) -> str:
    """A value as a cell of a table."""
    text = f"{value:,.3f}" if isinstance(value, float) else "" if value is None else str(value)
    return " ".join(text.replace("|", "\\|").split())


def parts_table(facts: Facts) -> str:
    rows = [{"part": name, **facts[name]} for name in facts["parts"]]
    return table(["part", "status", "seconds", "seconds_to_first_step", "seconds_to_target", "reason"], rows)


def tests_section(tests: Facts | None) -> str:
    if not tests or "passed" not in tests:
        return ""
    counts = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "error", "skipped"))
    rows = [row for row in tests["results"] if row["outcome"] not in ("passed", "skipped")]
    shown = [row | {"reason": " ".join(row["reason"].strip().splitlines()[-1:])} for row in rows]
    reasons = [row["reason"] for row in tests["results"] if row["outcome"] == "skipped"]
    lines = [f"## Tests\n\n{counts}.", *(f"Not run: {line}." for line in tests["not_run"])]
    lines += [f"Skipped {reasons.count(reason)}: {reason}." for reason in sorted(set(reasons))]
    return "\n\n".join([*lines, table(["name", "outcome", "reason"], shown)] if shown else lines)


def benchmarks_section(benchmarks: Facts) -> str:
    lines = []
    if peak := benchmarks.get("peak"):
        lines.append(
            "Peak, measured with products of large square matrices: "
            + ", ".join(f"{name} {value / 1e12:.2f} TFLOP/s" for name, value in peak.items())
        )
    for case in benchmarks.get("cases", []):
        rows = [variant_row(name, variant, case) for name, variant in case["variants"].items()]
        columns = ["variant", "ms", "kernel ms", "tokens/s", "share", "ours is faster by", "loss", "MiB", "note"]
        lines.append(f"### {case['name']}\n\n" + (case.get("error") or table(columns, rows)))
    if complete := benchmarks.get("complete_run"):
        lines.append("The train command, the seed's sizes: " + ", ".join(f"{k} {cell(v)}" for k, v in complete.items()))
    if names := benchmarks.get("not_measured"):
        lines.append(f"No time was left for: {'; '.join(names)}")
    return "\n\n".join(["## Benchmarks", *lines]) if lines else ""


def variant_row(name: str, variant: Facts, case: Facts) -> Facts:
    """One row of a benchmark's table."""
    if "ms" not in variant:
        return {"variant": name, "note": variant.get("error")}
    ratio, notes = case["ratios"].get(name), [variant["error"]] if "error" in variant else []
    notes += variant.get("warnings", [])
    if "packed" in variant:
        notes.append("weights packed" if variant["packed"] else "weights not packed")
    return {
        "variant": name,
        "ms": variant["ms"],
        "kernel ms": variant.get("kernel_ms"),
        "tokens/s": f"{variant['tokens_per_second']:,.0f}",
        "share": f"{variant['share']:.1%}",
        "ours is faster by": show_ratio(ratio) if ratio else "",
        "loss": loss_note(variant),
        "MiB": round(variant.get("allocated_bytes", 0) / 2**20) or None,
        "note": "; ".join(notes),
    }


def loss_note(variant: Facts) -> str:
    """Whether the first losses are those of plain modules in float32."""
    if "agrees" not in variant:
        return "not compared"
    return "agrees" if variant["agrees"] else f"differs by {variant['loss_difference']:.1e}"


def curves(facts: Facts) -> str:
    lines = []
    for name in ("training", "transformer"):
        if rows := facts.get(name, {}).get("validation"):
            title = f"## {name.capitalize()} ({facts[name]['corpus']})"
            lines.append(f"{title}\n\n{table(['step', 'nats', 'seconds', 'evaluation_seconds'], rows)}")
    return "\n\n".join(lines)


def failures(facts: Facts) -> str:
    """The last lines of the output of parts that failed."""
    parts = [(name, facts[name].get("output")) for name in facts["parts"]]
    return "\n\n".join(f"## Output of {name}\n\n```\n{output}\n```" for name, output in parts if output)
