"""Training steps on a GPU, with and without a CUDA graph, against plain ``nn`` modules.

    make bench-gpu        (or: python -m benchmarks.gpu [--seconds N] [--json FILE] [--device cpu] [--quick])

All variants start from the same weights and read the same windows, including their transfer to the GPU and the loss
that each step returns. Their first losses are compared before anything is timed. They take turns, in alternating
order; ratios are of neighbouring turns, with a bootstrap interval of their median. A variant that fails is reported and
the others are measured. A CPU, or ``--quick``, only checks the program.
"""

import argparse
import gc
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_device import device_facts, versions
from benchmarks.gpu_report import OURS, RIVAL, RIVAL_GRAPH, benchmarks_section, write_file
from benchmarks.loops import ONE_WORKER, Shapes, our_steps
from benchmarks.peak import product_peak, synchronize
from benchmarks.plain import PlainModel
from job.config.model import ModelConfig
from job.nn.language_model import build_model
from job.training.cuda_graph import GRAPH_ENV_VAR, capture_graph

ROOT = Path(__file__).resolve().parent.parent
COMPLETE_RUN_SECONDS = 90.0
CELLS = ("lstm", "gru", "rnn")
MARKED = [("rnn", 256, 32), ("gru", 256, 32), ("lstm", 256, 32), ("lstm", 4096, 512)]
SEED_STEPS, SEED_TOKENS, STEPS, TOKENS = 40, 28, 64, 128
UNITS, LANES = (1024, 4096, 2048, 256), (128, 512, 32)
MARKED_ROUNDS, ROUNDS, BLOCK_SECONDS = 15, 5, 0.1
COMPARED_STEPS, PROFILED_STEPS = 20, 5  # the first steps also warm up and capture the graph
TOLERANCES = {"fp32": 1e-4, "half": 1e-2}  # of a mean loss, relative to fp32's
AUTOCAST, PLAIN_BF16, REFERENCE, EAGER = "plain autocast", "plain bf16", "plain fp32", "ours, eager"
DTYPES = {
    AUTOCAST: torch.float32, REFERENCE: torch.float32, PLAIN_BF16: torch.bfloat16,
    RIVAL: torch.float16, RIVAL_GRAPH: torch.float16,
}  # fmt: skip


class SkewedShapes(Shapes):
    """Sizes with a text in which some tokens are more frequent, so that the loss falls from the first step on."""

    def text(self, num_workers: int = 1) -> np.ndarray:
        size = (3, 200 * self.lanes * self.steps * num_workers)
        return np.random.default_rng(0).integers(0, self.tokens, size, np.uint8).min(0)


@dataclass
class Variant:
    """Endless training steps that yield their mean loss in nats, and what is known about them."""

    losses: Iterator[float]
    facts: dict[str, Any]
    block: int = 1  # steps per turn


def plain_losses(model: PlainModel, shapes: Shapes, device: torch.device, autocast: bool) -> Iterator[float]:
    """The d2l book's loop with a fused optimizer."""
    optimizer, stream = torch.optim.SGD(model.parameters(), 0.1, fused=device.type == "cuda"), shapes.stream()
    while True:
        state = None
        for index in range(stream.partition(0).num_windows):
            inputs, targets = (part.to(device) for part in stream.read_window(0, index, range(shapes.lanes)))
            if state is not None:
                state = state.detach() if isinstance(state, torch.Tensor) else tuple(part.detach() for part in state)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits, state = model(inputs, state)
            loss = F.cross_entropy(logits.float(), targets.reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()


def graph_losses(model: PlainModel, shapes: Shapes, device: torch.device) -> Iterator[float]:
    """The same loop with each step captured in a CUDA graph, and a zero state at the start of each epoch."""
    optimizer, stream = torch.optim.SGD(model.parameters(), 0.1), shapes.stream()
    inputs, targets = (torch.zeros(shapes.steps, shapes.lanes, dtype=torch.int64, device=device) for _ in range(2))
    zeros = torch.zeros(1, shapes.lanes, shapes.units, device=device, dtype=model.linear.weight.dtype)
    state = tuple(zeros.clone() for _ in range(2 if shapes.cell == "lstm" else 1))

    def step() -> torch.Tensor:
        logits, new_state = model(inputs, state if shapes.cell == "lstm" else state[0])
        loss = F.cross_entropy(logits.float(), targets.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for old, new in zip(state, new_state if shapes.cell == "lstm" else (new_state,), strict=True):
            old.copy_(new.detach())
        return loss.detach()

    run_step: Callable[[], torch.Tensor] = step
    for number in itertools.count():
        index = number % stream.partition(0).num_windows
        for destination, source in zip(
            (inputs, targets), stream.read_window(0, index, range(shapes.lanes)), strict=True
        ):
            destination.copy_(source)
        if index == 0:
            for tensor in state:
                tensor.zero_()
        if number == 3:  # the first steps let libraries allocate their workspaces
            loss, replay = capture_graph(step)

            def run_step(loss: torch.Tensor = loss, replay: Callable[[], None] = replay) -> torch.Tensor:
                replay()
                return loss

        yield run_step().item()


def plain_variant(name: str, shapes: Shapes, device: torch.device) -> Variant:
    """Plain modules with our initial weights."""
    model = PlainModel(shapes.cell, shapes.tokens, shapes.units)
    model.load_state_dict(
        build_model(ModelConfig(cell=shapes.cell, hidden_size=shapes.units), shapes.tokens, 0).state_dict()
    )
    model = model.to(device, DTYPES[name])
    storages = {weight.untyped_storage().data_ptr() for weight in model.rnn.parameters()}
    facts = {"packed": len(storages) == 1} if device.type == "cuda" and name != AUTOCAST else {}
    if name == RIVAL_GRAPH:
        return Variant(graph_losses(model, shapes, device), facts)
    return Variant(plain_losses(model, shapes, device, name == AUTOCAST), facts)


def our_variant(name: str, shapes: Shapes, device: torch.device) -> Variant:
    """This program's training loop in bf16."""
    with mock.patch.dict(os.environ, {} if name == OURS else {GRAPH_ENV_VAR: "off"}):
        steps = our_steps(shapes, "bf16", replace(ONE_WORKER, device=device), exact_steps=COMPARED_STEPS)
    tokens = shapes.lanes * shapes.steps
    return Variant((result.stats.nats / tokens for result in steps), {})  # type: ignore[attr-defined]


def variant_names(device: torch.device) -> list[str]:
    return (
        [RIVAL, RIVAL_GRAPH, PLAIN_BF16, AUTOCAST, EAGER, OURS]
        if device.type == "cuda"
        else [REFERENCE, PLAIN_BF16, EAGER]
    )


def prepare(name: str, shapes: Shapes, device: torch.device, reference: list[float]) -> Variant:
    """Builds a variant, takes its first steps, and measures their losses and memory."""
    on_gpu, before = device.type == "cuda", 0
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        reserved_before = torch.cuda.memory_reserved()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        variant = (our_variant if name in (EAGER, OURS) else plain_variant)(name, shapes, device)
        losses = [next(variant.losses) for _ in range(COMPARED_STEPS)]
    variant.facts["losses"] = losses
    if reference:
        difference = max(abs(a - b) / b for a, b in zip(losses, reference, strict=True))
        is_close = not math.isnan(sum(losses)) and difference <= TOLERANCES["fp32" if name == REFERENCE else "half"]
        variant.facts |= {"loss_difference": difference, "agrees": is_close}
    if messages := sorted({str(warning.message) for warning in caught}):
        variant.facts["warnings"] = messages
    if on_gpu:
        variant.facts["allocated_bytes"] = torch.cuda.max_memory_allocated() - before
        variant.facts["reserved_bytes"] = torch.cuda.max_memory_reserved() - reserved_before
    variant.block = max(2, min(200, round(BLOCK_SECONDS / seconds_per_step(variant, 2, device))))
    return variant


def seconds_per_step(variant: Variant, steps: int, device: torch.device) -> float:
    """Mean seconds of some steps, with the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        next(variant.losses)
    synchronize(device)
    return (time.perf_counter() - start) / steps


def measure_kernels(case: dict[str, Any], shapes: Shapes, device: torch.device) -> None:
    """Adds to a case the sum of the durations of all kernels and copies of a step on the GPU, in two variants."""
    for name in (RIVAL, OURS):
        facts = case["variants"].get(name, {})
        if "ms" in facts and (variant := guarded(facts, partial(prepare, name, shapes, device, []))):
            milliseconds = guarded(facts, partial(kernel_milliseconds, variant))
            facts |= (
                {"kernel_ms": milliseconds, "loop_over_kernels": facts["ms"] / milliseconds} if milliseconds else {}
            )


def kernel_milliseconds(variant: Variant) -> float:
    """The sum of the durations of all kernels and copies of a step; 0 if the profiler sees none."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_STEPS):
            next(variant.losses)
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    return sum(event.self_device_time_total for event in events if not event.is_user_annotation) / 1e3 / PROFILED_STEPS


def interval(pairs: list[float]) -> dict[str, float]:
    """The median of ratios, and the middle 95 % of its bootstrap distribution."""
    random_numbers = random.Random(0)
    medians = sorted(statistics.median(random_numbers.choices(pairs, k=len(pairs))) for _ in range(1000))
    return {"median": statistics.median(pairs), "low": medians[25], "high": medians[974]}


def take_turns(variants: dict[str, Variant], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step of each variant and round; the order alternates."""
    results: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants)[:: -1 if number % 2 else 1]:
            results[name].append(seconds_per_step(variants[name], variants[name].block, device))
    return results


def guarded(facts: dict[str, Any], action: Callable[[], Any]) -> Any:
    """The result of the action; None, and the error in the facts, if it fails: the rest is still worth measuring."""
    try:
        return action()
    except Exception as error:
        facts["error"] = f"{type(error).__name__}: {' '.join(str(error).splitlines()[:1])}"
        return None


def measure_case(shapes: Shapes, rounds: int, device: torch.device, peak: dict[str, float]) -> dict[str, Any]:
    """Measures one cell at one size."""
    facts: dict[str, dict[str, Any]] = {name: {} for name in variant_names(device)}
    reference = guarded({}, partial(reference_losses, shapes, device)) or []
    variants = {}
    for name, own_facts in facts.items():
        if variant := guarded(own_facts, partial(prepare, name, shapes, device, reference)):
            own_facts.update(variant.facts)
            variants[name] = variant
    seconds = take_turns(variants, rounds, device)
    for name, values in seconds.items():
        median = statistics.median(values)
        limit = peak.get("fp16" if name in (RIVAL, RIVAL_GRAPH, AUTOCAST) else "bf16", peak["bf16"])
        facts[name] |= {
            "ms": median * 1e3,
            "tokens_per_second": shapes.lanes * shapes.steps / median,
            "share": shapes.operations / median / limit,
            "rounds_ms": [value * 1e3 for value in values],
        }
    ours = seconds.get(OURS if device.type == "cuda" else EAGER, [])
    ratios = {
        name: interval([a / b for a, b in zip(values, ours, strict=True)])
        for name, values in seconds.items()
        if name.startswith("plain") and ours
    }
    return {"variants": facts, "ratios": ratios}


def reference_losses(shapes: Shapes, device: torch.device) -> list[float]:
    """The first losses of plain modules in float32."""
    variant = plain_variant(REFERENCE, shapes, device)
    return [next(variant.losses) for _ in range(COMPARED_STEPS)]


def all_cases(quick: bool) -> list[tuple[str, int, int]]:
    """Cell, hidden units and lanes, the most important first."""
    if quick:
        return [("rnn", 32, 4), ("lstm", 64, 8)]
    rest = [(cell, units, lanes) for lanes in LANES for units in UNITS for cell in CELLS]
    return MARKED + [case for case in rest if case not in MARKED]


def case_shapes(cell: str, units: int, lanes: int, quick: bool) -> Shapes:
    if quick:
        return SkewedShapes(cell, lanes, 10, units, SEED_TOKENS)
    is_seed = (units, lanes) == (256, 32)
    return SkewedShapes(cell, lanes, SEED_STEPS if is_seed else STEPS, units, SEED_TOKENS if is_seed else TOKENS)


def complete_run(device: torch.device, steps: int) -> dict[str, Any]:
    """The ``train`` command with the seed's sizes and an LSTM: the time of a step with everything that a run does."""
    with tempfile.TemporaryDirectory() as storage:
        command = [sys.executable, "-m", "job", "train", "configs/seed.toml", "--corpus.source", "embedded"]
        command += ["--model.cell", "lstm", "--train.max_steps", str(steps), "--train.log_every", str(steps // 10)]
        command += ["--scale.accelerator", "gpu" if device.type == "cuda" else "cpu", "--scale.workers", "0"]
        command += ["--run.storage", storage, "--run.name", "run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, timeout=COMPLETE_RUN_SECONDS)
        lines = (Path(storage) / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "train"]
    speeds = [row["tokens_per_second"] for row in rows[len(rows) // 2 :]]
    return {"cell": "lstm", "steps": steps, "tokens_per_second": statistics.median(speeds)}


def run(device: torch.device, quick: bool, seconds: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures as many cases as there is time for; saves the results after each."""
    deadline = time.monotonic() + seconds
    sides = {"cuda": 8192, "cpu": 512 if quick else 2048}
    names = {"bf16": torch.bfloat16} | ({"fp16": torch.float16} if device.type == "cuda" else {})
    peak = {name: product_peak(device, dtype, sides[device.type]) for name, dtype in names.items()}
    results: dict[str, Any] = {"peak": peak, "cases": [], "not_measured": []}
    for case in all_cases(quick):
        name = "{} of {} units, batch {}".format(*case)
        if time.monotonic() > deadline:
            results["not_measured"].append(name)
            continue
        print(name, flush=True)
        shapes, rounds = case_shapes(*case, quick), 2 if quick else MARKED_ROUNDS if case in MARKED else ROUNDS
        sizes = dict(zip(("cell", "units", "lanes"), case, strict=True)) | {
            "steps": shapes.steps,
            "tokens": shapes.tokens,
        }
        measured: dict[str, Any] = {"name": name, **sizes, "variants": {}, "ratios": {}}
        measured |= guarded(measured, partial(measure_case, shapes, rounds, device, peak)) or {}
        results["cases"].append(measured)
        if case == MARKED[-1] or (quick and len(results["cases"]) == 1):
            steps, results["complete_run"] = 20 if quick else 3000, {}
            results["complete_run"] |= guarded(results["complete_run"], partial(complete_run, device, steps)) or {}
        save(results)
    if device.type == "cuda":  # last, because a profiler may slow down or end the program
        for case in results["cases"][: len(MARKED)]:
            measure_kernels(case, case_shapes(case["cell"], case["units"], case["lanes"], quick), device)
            save(results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="small sizes, which only check the program")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further case after this time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no GPU on this machine; --device cpu checks the program")
    quick = args.quick or device.type == "cpu"
    described = {"device": device_facts(device), "versions": versions()}

    def save(results: dict[str, Any]) -> None:
        if args.json:
            write_file(args.json, json.dumps(described | results, indent=1))

    results = run(device, quick, args.seconds, save)
    save(results)
    print(", ".join(f"{name} {value}" for facts in described.values() for name, value in facts.items() if value))
    print(benchmarks_section(results))


if __name__ == "__main__":
    main()
