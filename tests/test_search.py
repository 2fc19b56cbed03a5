"""Searches without Ray: the space, its checks, the records of trials, and what is written of them."""

import contextlib
import errno
import io
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from conftest import is_picture, job, not_none, pictures, search_config, start_job
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs, parquet

from job import storage
from job.cluster.connection import connect
from job.cluster.tune import run_search
from job.config.config_file import load_config, load_search_config
from job.config.run import ScaleConfig
from job.config.schema import Config
from job.config.search_space import SearchConfig, search_differences
from job.config.toml import config_to_toml, override_config, search_config_from_toml
from job.console import Console
from job.errors import RunFailed, UserError
from job.run.driver import run_training
from job.run.lease import Lease
from job.run.local_launcher import LocalLauncher
from job.run.run_dir import SEARCH_FILE, read_existing_run
from job.run.signals import StopRequest
from job.storage import Folder
from job.training.checkpoint import find_latest_valid
from job.training.progress import perplexity
from job.tuning.exchange import export_checkpoint, forget_exchange, import_checkpoint
from job.tuning.optuna_sampler import OptunaSampler
from job.tuning.plots import plot_curves
from job.tuning.report import display_name
from job.tuning.results import to_parquet
from job.tuning.setup import check_search, resolve_search
from job.tuning.trials import (
    TRIALS_FILE,
    Trials,
    baseline_params,
    load_trials,
    trial_config,
    trial_folder,
    trial_params,
)

SPACE = {
    "optimizer.learning_rate": {"loguniform": [0.01, 4]},
    "model.dropout": {"uniform": [0, 0.5]},
    "model.hidden_size": {"randint": [8, 32]},
    "optimizer.name": {"choice": ["sgd", "adamw"]},
    "model.cell": {"grid": ["rnn", "gru", "lstm"]},
}


@given(seed=st.integers(0, 2**63), number=st.integers(0, 10**6))
def test_sample_is_a_pure_function_with_values_in_the_space(seed: int, number: int) -> None:
    space = search_config(space=SPACE).space
    params = space.sample(seed, number)
    assert params == space.sample(seed, number)
    assert 0.01 <= params["optimizer.learning_rate"] <= 4
    assert 0 <= params["model.dropout"] <= 0.5
    assert params["model.hidden_size"] in range(8, 33)
    assert params["optimizer.name"] in ("sgd", "adamw")
    assert params["model.cell"] == ("rnn", "gru", "lstm")[number % 3]
    config = override_config(load_config(None, {}), params)
    assert config.model.cell == params["model.cell"]
    assert config.optimizer.learning_rate == params["optimizer.learning_rate"]


def test_sample_of_a_field_does_not_depend_on_other_fields() -> None:
    alone = search_config(space={"model.dropout": SPACE["model.dropout"]}).space
    assert alone.sample(3, 5)["model.dropout"] == search_config(space=SPACE).space.sample(3, 5)["model.dropout"]


def test_sample_of_a_grid_search_enumerates_the_grid() -> None:
    search = search_config(
        searcher="grid", space={"model.cell": SPACE["model.cell"], "model.num_layers": {"choice": [1, 2]}}
    )
    samples = [tuple(search.space.sample(0, number).values()) for number in range(search.num_trials)]
    assert samples == [("rnn", 1), ("rnn", 2), ("gru", 1), ("gru", 2), ("lstm", 1), ("lstm", 2)]


def test_num_trials_is_the_grid_size_or_16_unless_given() -> None:
    assert search_config(space=SPACE).num_trials == 16
    assert search_config(space=SPACE, trials=40).num_trials == 40
    assert search_config(space={"model.cell": SPACE["model.cell"]}, trials=40).num_trials == 3
    assert search_config(space={"model.cell": SPACE["model.cell"]}, trials=2).num_trials == 2


def test_search_to_toml_reads_back_to_the_same_search() -> None:
    search = search_config(trials=7, scheduler="asha", space=SPACE)
    base = load_config(None, {"model.cell": "gru"})
    text = config_to_toml(base, search)
    assert search_config_from_toml(text, "here") == (base, search)
    assert search_differences(search, search_config(trials=9, scheduler="asha", space=SPACE)) == []
    other = search_config(trials=7, space={**SPACE, "model.dropout": {"uniform": [0, 0.9]}})
    assert search_differences(search, other) == [
        'search.scheduler ("asha" → "none")',
        "search.space model.dropout ({ uniform = [0.0, 0.5] } → { uniform = [0.0, 0.9] })",
    ]


def test_load_config_ignores_the_search_section(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        '[model]\ncell = "gru"\n[search]\ntrials = 3\n[search.space]\n"model.dropout" = { uniform = [0, 0.5] }'
    )
    assert load_config(str(path), {}) == load_config(None, {"model.cell": "gru"})
    config, search = load_search_config(str(path), {"search.trials": "5"})
    assert (config.model.cell, search.trials, list(search.space.domains)) == ("gru", 5, ["model.dropout"])


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[search]\ntrails = 3", "unknown field search.trails; did you mean search.trials?"),
        ('[search]\nsearcher = "random2"', 'search.searcher = "random2": must be one of random, grid, optuna'),
        ('[search]\nscheduler = "asa"', 'search.scheduler = "asa": must be one of none, asha, pbt'),
        ('[search]\nmetric = "loss"', 'search.metric = "loss": must be one of validation_perplexity, perplexity'),
        ("[search]\ntrials = -1", "search.trials = -1: must be at least 0"),
        ("[search]\nspace = 3", "search.space must be a section"),
        ("[search.space]\n'model.hiden_size' = { choice = [3] }", "model.hiden_size; did you mean model.hidden_size?"),
        ("[search.space]\n'scale.workers' = { choice = [1, 2] }", "scale.workers does not affect the result of a run"),
        (
            "[search.space]\n'model.dropout' = { grid = [0] }\nmodel.dropout = { grid = [0.1] }",
            "search.space: model.dropout is given twice; remove one of them",
        ),
        ("[search.space]\n'model.dropout' = 3", "must be one of { uniform = […] }"),
        ("[search.space]\n'model.dropout' = { unifrom = [0, 1] }", "must be one of { uniform = […] }"),
        ("[search.space]\n'model.dropout' = { uniform = [0.5, 0.1] }", "the range is empty or not finite"),
        ("[search.space]\n'model.dropout' = { uniform = [0.5] }", "must be two numbers, low and high"),
        ("[search.space]\n'model.dropout' = { loguniform = [0, 0.5] }", "log-uniform range must be greater than 0"),
        ("[search.space]\n'model.hidden_size' = { randint = [1.5, 8] }", "must be two integers"),
        ("[search.space]\n'model.cell' = { choice = [] }", "must contain a list of values"),
        ("[search.space]\n'model.cell' = { choice = ['rnn', 'rnn'] }", "contains a value twice"),
        (f"[search.space]\n'model.init' = {{ choice = {list(range(10_001))} }}", "10,001 values, more than 10,000"),
        (f"[search.space]\n'model.dropout' = {{ uniform = [0, 1{'0' * 400}] }}", "the range is empty or not finite"),
        ("[search.space]\n'model.dropout' = { uniform = [0, nan] }", "the range is empty or not finite"),
        ("[search]\nsearcher = 'grid'\n[search.space]\n'model.dropout' = { uniform = [0, 1] }", "is not a list"),
        ("[search]\nscheduler = 'pbt'\n[search.space]\n'model.init' = { choice = ['rnn'] }", "cannot change"),
        ("[search]\nscheduler = 'pbt'\nsearcher = 'optuna'", "not possible with scheduler"),
    ],
)  # fmt: skip
def test_load_config_with_an_invalid_search_raises_user_error(tmp_path: Path, toml: str, message: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(toml)
    with pytest.raises(UserError) as error:
        load_config(str(path), {})
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


NO_VALIDATION = {"corpus.validation_fraction": "0"}


@pytest.mark.parametrize(
    ("space", "flags", "message"),
    [
        ({}, {}, "search.space: is empty; write lines such as"),
        ({"optimizer.learning_rate": {"uniform": [-1, 1]}}, {}, "learning_rate = -1.0: must be greater than 0"),
        ({"model.hidden_size": {"uniform": [8, 16]}}, {}, "model.hidden_size = 8.0: must be an integer"),
        ({"model.cell": {"grid": ["rnn", "gruu"]}}, {}, "model.cell = \"gruu\": must be one of rnn, gru, lstm"),
        ({"stream.batch_size": {"randint": [8, 9000]}}, {}, "at stream.batch_size = 9000: stream.batch_size = 9000"),
        ({"model.cell": {"grid": [["rnn", ["gru"]], {"rnn": 1}]}}, {}, 'model.cell = ["rnn", ["gru"]]: must be text'),
        ({"model.dropout": {"uniform": [0, 0.5]}}, NO_VALIDATION, "is never reported"),
    ],
)  # fmt: skip
def test_check_search_with_invalid_params_raises_user_error(
    prose: Path, tmp_path: Path, space: dict[str, Any], flags: dict[Any, Any], message: str
) -> None:
    flags = {"corpus.source": str(prose), "corpus.validation_fraction": "0.1", "generate.prefix": "the", **flags}
    with pytest.raises(UserError) as error:
        check_search(load_config(None, flags), search_config(space=space), Folder(str(tmp_path / "search")), Console())
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


LEARNING_RATE = {"optimizer.learning_rate": {"loguniform": [0.01, 4]}}


@pytest.mark.parametrize(
    ("scheduler", "flags", "space", "message"),
    [
        ("asha", {"train.epochs": "1"}, {}, "after epoch 1 and train.epochs = 1 ends them in epoch 1"),
        ("asha", {"train.max_steps": "5"}, {}, "after epoch 10 and train.max_steps = 5 ends them in epoch 1"),
        ("asha", {"train.max_steps": "90"}, {}, "after epoch 10 and train.max_steps = 90 ends them in epoch 4"),
        ("asha", {}, {"train.epochs": {"choice": [1]}}, "train.epochs = 1 ends them in epoch 1"),
        ("asha", {"train.max_steps": "9"}, {"stream.num_steps": {"choice": [9, 20]}}, "train.max_steps = 9 ends them"),
        ("asha", {"search.trials": "1"}, {}, "there is only one trial"),
        ("pbt", {"train.epochs": "1"}, {}, "train.epochs = 1 ends them in epoch 1"),
        ("pbt", {"train.max_steps": "5"}, {}, "after epoch 5 and train.max_steps = 5 ends them in epoch 1"),
        ("pbt", {"search.trials": "1"}, {}, "there is only one trial"),
        ("none", {"train.epochs": "1"}, {}, ""),
        ("none", {"search.trials": "1"}, {}, ""),
        ("asha", {"train.epochs": "2"}, {}, ""),
        ("asha", {"train.epochs": "1"}, {"train.epochs": {"choice": [1, 2]}}, ""),
        ("asha", {"train.epochs": "4", "train.max_steps": "40"}, {}, ""),
        ("asha", {"train.epochs": "4", "train.max_steps": "9"}, {"stream.num_steps": {"choice": [20, 120]}}, ""),
        ("pbt", {"train.epochs": "2"}, {}, ""),
    ],
)
def test_check_search_with_a_scheduler_without_effect_raises_user_error(
    prose: Path,
    tmp_path: Path,
    scheduler: str,
    flags: dict[str, str],
    space: dict[str, dict[str, list[int]]],
    message: str,
) -> None:
    defaults = {"train.epochs": "40", "corpus.max_tokens": "5000", "stream.batch_size": "8", "stream.num_steps": "20"}
    flags = {
        **defaults,
        "corpus.source": str(prose),
        "corpus.validation_fraction": "0.1",
        "model.hidden_size": "8",
        **flags,
    }
    trials = int(flags.pop("search.trials", 0))
    search = search_config(scheduler=scheduler, trials=trials, space={**LEARNING_RATE, **space})
    config = load_config(None, {**flags, "generate.prefix": "the"})
    if not message:
        check_search(config, search, Folder(str(tmp_path / "search")), Console())
        return
    with pytest.raises(UserError) as error:
        check_search(config, search, Folder(str(tmp_path / "search")), Console())
    assert str(error.value).startswith(f'search.scheduler = "{scheduler}": has no effect, as ')
    assert message in str(error.value)


def test_resolve_search_where_another_search_or_run_exists_raises_user_error(tmp_path: Path) -> None:
    search = search_config(space={"model.dropout": {"uniform": [0, 0.5]}})
    config = load_config(None, {"run.storage": str(tmp_path), "run.name": "it"})
    folder, resolved = resolve_search(config, search, "")
    folder.write(SEARCH_FILE, config_to_toml(resolved, search).encode())
    assert resolve_search(config, search, "") == (folder, resolved)
    with pytest.raises(UserError, match=r"is another search: optimizer\.name"):
        resolve_search(override_config(config, {"optimizer.name": "adamw"}), search, "")
    Folder(str(tmp_path / "run")).write("config.toml", b"")
    with pytest.raises(UserError, match="is a run, not a search"):
        resolve_search(override_config(config, {"run.name": "run"}), search, "")


def test_resolve_search_with_more_epochs_than_a_trial_schedule_spans_raises_user_error(tmp_path: Path) -> None:
    config = load_config(None, {"run.storage": str(tmp_path), "run.name": "it", "train.epochs": "2"})
    longer = override_config(config, {"train.epochs": 4})
    for values, is_refused in ((["constant", "cosine"], True), (["constant"], False)):
        search = search_config(space={"optimizer.schedule": {"choice": values}})
        (Folder(str(tmp_path)) / "it").write(SEARCH_FILE, config_to_toml(config, search).encode())
        if is_refused:
            with pytest.raises(UserError, match=r"train\.epochs \(2 → 4\), the schedule's length unless"):
                resolve_search(longer, search, "")
        else:
            assert resolve_search(longer, search, "")[1] == longer


TEN_VALUES = {"grid": list(range(1, 11))}
GRIDS = dict.fromkeys(("train.epochs", "model.hidden_size", "model.num_layers", "stream.offset"), TEN_VALUES)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"space": {**GRIDS, "model.embedding_size": {"grid": list(range(10_000))}}}, "100,000,000"),
        ({"space": {**GRIDS, **LEARNING_RATE, "stream.num_steps": TEN_VALUES}}, "100,000"),
        ({"space": LEARNING_RATE, "trials": 1_000_000_000}, "1,000,000,000"),
        ({"space": LEARNING_RATE, "trials": 1_000_000, "scheduler": "pbt"}, "1,000,000"),
        ({"space": {**GRIDS, "stream.num_steps": TEN_VALUES}, "trials": 10_000}, ""),
    ],
)
def test_resolve_search_with_too_many_trials_raises_user_error(
    tmp_path: Path, options: dict[str, dict[str, dict[str, list[Any]]]], count: str
) -> None:
    config, search = load_config(None, {"run.storage": str(tmp_path), "run.name": "it"}), search_config(**options)
    if not count:
        assert resolve_search(config, search, "")[1] == config
        return
    with pytest.raises(UserError, match=rf"search\.trials = \d+: {count} trials, of at most 10,000; set a"):
        resolve_search(config, search, "")


@pytest.mark.slow
def test_tune_while_it_checks_many_values_shows_progress_and_ends_at_the_first_interrupt(
    prose: Path, tmp_path: Path
) -> None:
    config = tmp_path / "many.toml"
    config.write_text(f'[search.space]\n"model.hidden_size" = {{ choice = {list(range(1, 9001))} }}')
    flags = ["--corpus.source", prose, "--corpus.validation_fraction", 0.1, "--run.storage", tmp_path]
    process = start_job("tune", config, *flags, "--generate.prefix", "the")
    assert "of 9,000 values in search.space" in not_none(process.stdout).readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 130
    assert [path.name for path in tmp_path.iterdir()] == ["many.toml"]


def test_optuna_sampler_rebuilt_by_replay_continues_identically() -> None:
    pytest.importorskip("optuna")

    space = search_config(space=SPACE).space
    first = OptunaSampler(space, 3)
    trial_params = [first.ask(number) for number in range(12)]
    assert trial_params[0] == OptunaSampler(space, 3).ask(0)
    for number, params in enumerate(trial_params):
        override_config(load_config(None, {}), params)
        first.tell(number, None if number == 3 else params["model.dropout"])
    rebuilt = OptunaSampler(space, 3)
    for number, params in enumerate(trial_params):
        rebuilt.replay(number, params)
        rebuilt.tell(number, None if number == 3 else params["model.dropout"])
    assert rebuilt.study.best_value == first.study.best_value
    assert rebuilt.ask(12) == first.ask(12)
    assert rebuilt.ask(13) not in trial_params


def test_search_space_accepts_nested_tables() -> None:
    nested = search_config(space={"optimizer": {"learning_rate": SPACE["optimizer.learning_rate"]}})
    assert nested == search_config(space={"optimizer.learning_rate": SPACE["optimizer.learning_rate"]})


def test_baseline_params_outside_the_space_is_none() -> None:
    search = search_config(space={"stream.offset": {"randint": [0, 40]}})
    assert baseline_params(load_config(None, {}), search) is None
    assert not_none(trial_params(load_config(None, {}), search, 0))["stream.offset"] in range(41)


def test_to_parquet_writes_values_of_mixed_types_as_text(tmp_path: Path) -> None:
    search = search_config(space={"stream.offset": {"grid": ["random", 0, [1, 2]]}})
    table = to_parquet(load_trials(Folder(str(tmp_path)), load_config(None, {}), search))
    values = parquet.read_table(io.BytesIO(table)).column("stream.offset").to_pylist()
    assert values == ['"random"', "0", "[1, 2]"]


def test_import_checkpoint_last_exchanged_does_not_rewind_the_run(prose: Path, tmp_path: Path) -> None:
    """After a process died, Ray Tune restores the checkpoint it knows, while the run has continued since."""
    flags = ["--corpus.source", prose, "--run.storage", tmp_path, "--scale.workers", 0, "--generate.prefix", "the"]
    flags += ["--model.hidden_size", 8, "--run.name", "run"]
    assert job("train", *flags, "--train.max_steps", 10).status == 0
    run, exchange = Folder(str(tmp_path / "run")), Folder(str(tmp_path / "exchange"))
    checkpoint = not_none(find_latest_valid(run / "checkpoints")[0])
    export_checkpoint(checkpoint, run, exchange)
    assert job("train", *flags, "--train.max_steps", 20).status == 0
    import_checkpoint(exchange, run, not_none(read_existing_run(run)).config)
    assert not_none(find_latest_valid(run / "checkpoints")[0]).step == 20
    forget_exchange(run)
    import_checkpoint(exchange, run, not_none(read_existing_run(run)).config)
    assert not_none(find_latest_valid(run / "checkpoints")[0]).step == 10
    perturbed = override_config(not_none(read_existing_run(run)).config, {"optimizer.learning_rate": 0.5})
    import_checkpoint(exchange, run, perturbed)
    assert not_none(find_latest_valid(run / "checkpoints")[0]).step == 10
    assert not_none(read_existing_run(run)).config == perturbed


def test_import_checkpoint_of_a_folder_that_was_removed_fails_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="exchange/1: the checkpoint that another trial exported is missing"):
        import_checkpoint(Folder(str(tmp_path / "exchange" / "1")), Folder(str(tmp_path)), load_config(None, {}))


@pytest.mark.parametrize("concurrent", [10_000, 10**9])
def test_connect_with_more_concurrent_runs_than_this_machine_can_hold_raises_user_error(
    monkeypatch: pytest.MonkeyPatch, concurrent: int
) -> None:
    """Ray would start a process for each."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("job.cluster.connection.available_cpus", lambda: 4)
    with contextlib.ExitStack() as stack, pytest.raises(UserError, match=r"more than 16 on each of the 4 cores here"):
        connect(ScaleConfig(workers=1), stack, concurrent)


def test_console_print_erases_redrawn_lines() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    console = Console(terminal)
    console.redraw(["a", "b", "c"])
    console.print("stays")
    assert terminal.getvalue() == "a\nb\nc\r\x1b[2A\x1b[Jstays\n"
    assert display_name("validation_perplexity") == "validation perplexity"


def test_search_space_does_not_depend_on_the_order_of_lines() -> None:
    """A search resumes after the lines of its file were reordered: no trial changes its parameters."""
    grids = {"model.cell": {"grid": ["rnn", "gru"]}, "model.hidden_size": {"grid": [8, 16]}}
    one, other = search_config(space=grids), search_config(space=dict(reversed(grids.items())))
    assert search_differences(one, other) == []
    assert [one.space.sample(0, number) for number in range(4)] == [
        other.space.sample(0, number) for number in range(4)
    ]


@pytest.mark.parametrize("scheduler", ["none", "pbt"])
def test_winner_is_never_a_trial_whose_loss_is_not_finite(tmp_path: Path, scheduler: str) -> None:
    search = search_config(trials=3, space={"optimizer.learning_rate": {"uniform": [0.1, 1]}}, scheduler=scheduler)
    trials = load_trials(Folder(str(tmp_path)), load_config(None, {}), search)
    for number, nats in ((0, math.nan), (1, math.inf)):
        trials.start(number, {})
        trials.report(number, 1, perplexity(nats))
    assert trials.winner is None
    trials.start(2, {})
    trials.report(2, 1, 1e9)
    assert not_none(trials.winner).number == 2


def test_trials_end_keeps_the_records_of_trials_beyond_num_trials(tmp_path: Path) -> None:
    space = {"optimizer.learning_rate": {"loguniform": [0.01, 4]}}
    base, folder = load_config(None, {}), Folder(str(tmp_path))
    all_four = load_trials(folder, base, search_config(trials=4, space=space))
    for number in range(4):
        params = all_four.by_number[number].params
        config = trial_config(base, folder, number, params)
        trial_folder(folder, number).write("config.toml", config_to_toml(config).encode())
        all_four.start(number, params)
        all_four.end(number, "stopped")
    all_four.write_records()
    one = load_trials(folder, base, search_config(trials=1, space=space))
    one.end(0, "failed", "its process died")
    one.write_records()
    records = json.loads((tmp_path / TRIALS_FILE).read_text())
    assert records["00000"] == {"state": "failed", "why": "its process died", "point": one.by_number[0].params}
    again = load_trials(folder, base, search_config(trials=4, space=space))
    assert [trial.state for trial in again] == ["failed", "stopped", "stopped", "stopped"]
    (tmp_path / TRIALS_FILE).write_text("[")
    with pytest.raises(UserError, match="invalid content; remove it"):
        load_trials(folder, base, search_config(trials=4, space=space))


def test_load_config_reads_a_uri(tmp_path: Path) -> None:
    (tmp_path / "best.toml").write_text('[model]\ncell = "gru"')
    assert load_config(f"file://{tmp_path}/best.toml", {}).model.cell == "gru"
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(f"file://{tmp_path}/worst.toml", {})


@pytest.mark.parametrize("metric", ["validation_perplexity", "perplexity"])
def test_trial_whose_metric_is_not_a_number_never_wins(tmp_path: Path, metric: str) -> None:
    """NaN is neither less nor greater than any number, so such a trial could win, and hid all after it."""
    search = search_config(metric=metric, space={"optimizer.learning_rate": {"grid": [0.1, 0.2, 0.3, 0.4]}})
    base = load_config(None, {"corpus.validation_fraction": "0.1"})
    folder, split = Folder(str(tmp_path)), "validation" if metric == "validation_perplexity" else "epoch"
    for number, values in enumerate([[math.nan, math.nan], [5.0, 4.0], [math.nan, 3.0], [math.inf]]):
        params = trial_params(base, search, number)
        run = trial_folder(folder, number)
        run.write("config.toml", config_to_toml(trial_config(base, folder, number, not_none(params))).encode())
        rows = [
            {"split": each, "epoch": n, "step": n, "perplexity": value}
            for n, value in enumerate(values, 1)
            for each in dict.fromkeys(("epoch", split))
        ]
        run.write("metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    trials = load_trials(folder, base, search)
    assert [trial.number for trial in trials.ranked()] == [2, 1, 0, 3]
    assert not_none(trials.winner).number == 2
    for trial in trials:
        trials.end(trial.number, "finished")
    trials.write_records()
    assert "NaN" not in (tmp_path / TRIALS_FILE).read_text()
    assert all(map(math.isfinite, parquet.read_table(io.BytesIO(to_parquet(trials))).column(metric).to_pylist()))
    with pictures():
        assert is_picture(plot_curves(trials))
    trials.by_number = {number: trials.by_number[number] for number in (0, 3)}
    assert trials.winner is None


# --- searches in this process: their trials run one after another -------------------------------------


@pytest.fixture
def small_search(prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function that runs a search of two short trials in ``tmp_path / "it"``, and the content of that folder."""

    def run_trials(trials: Trials, placement: None, lease: Lease, stop_request: StopRequest, console: Console) -> None:
        for trial in [trial for trial in trials if not trial.is_done]:
            trials.start(trial.number, trial.params)
            config = trial_config(trials.base, trials.folder, trial.number, trial.params)
            run_training(config, "", Console(io.StringIO()), LocalLauncher())
            trials.end(trial.number, "finished")
            trials.write_records()

    @contextlib.contextmanager
    def connected(
        base: Config, search: SearchConfig, console: Console
    ) -> Iterator[tuple[tuple[Config, SearchConfig], None]]:
        yield (base, search), None

    monkeypatch.setattr("job.cluster.tune._connected", connected)
    monkeypatch.setattr("job.cluster.tune._run_trials", run_trials)
    flags = {"corpus.source": str(prose), "corpus.validation_fraction": "0.1", "generate.prefix": "the"}
    flags |= {"run.storage": str(tmp_path), "run.name": "it", "model.hidden_size": "8", "scale.workers": "0"}
    config = load_config(None, {**flags, "train.epochs": "1", "train.max_steps": "5"})
    search = search_config(space={"optimizer.learning_rate": {"grid": [0.1, 1.0]}})
    output = io.StringIO()

    def run() -> tuple[int, str]:
        return run_search(config, search, "", Console(output)), output.getvalue()

    return run


def take_over(folder: Folder) -> None:
    """Overwrites the lease as the next driver does after it has expired."""
    owner = json.loads(folder.read("owner.json"))
    folder.write("owner.json", json.dumps({**owner, "token": "of the new owner"}).encode())


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        ("job.cluster.tune.config_to_toml", ["search.toml", "trials.json", "best.toml"]),
        ("job.cluster.tune._run_trials", ["trials.json", "sample.txt", "best.toml"]),
        ("job.cluster.tune.write_results", ["sample.txt", "best.toml"]),
        ("job.tuning.results.plot_curves", ["curves.png", "best.toml"]),
        ("job.tuning.results.hparams", ["tensorboard", "best.toml"]),
    ],
)
def test_search_after_takeover_writes_no_records(
    small_search: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, missing: list[str]
) -> None:
    original = resolve_name(function)

    def call(*args: Any, **options: Any) -> str:
        take_over(Folder(str(tmp_path / "it")))
        return original(*args, **options)

    monkeypatch.setattr(function, call)
    with pytest.raises(RunFailed, match="another driver has taken this run over"):
        small_search()
    assert not set(missing) & {path.name for path in (tmp_path / "it").iterdir()}
    assert b"of the new owner" in (tmp_path / "it" / "owner.json").read_bytes()


@pytest.mark.parametrize(
    ("file", "number"),
    [
        ("search.toml", errno.EROFS),
        ("trials.json", errno.ENOSPC),
        ("trials.parquet", errno.ENOSPC),
        ("best.toml", errno.EROFS),
    ],
)
def test_search_on_full_or_read_only_storage_fails_with_one_line_and_resumes(
    small_search: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, file: str, number: int
) -> None:
    write = storage._write_local

    def fail(folder: Path, name: str, data: tuple[Any, ...], check_change: Callable[..., Any]) -> None:
        if name == file:
            raise OSError(number, os.strerror(number))
        write(folder, name, data, check_change)

    with monkeypatch.context() as patch, pytest.raises(RunFailed) as error:
        patch.setattr(storage, "_write_local", fail)
        small_search()
    assert error.value.problem.endswith(f"it: cannot be read or written: {os.strerror(number)}")
    assert error.value.remedy == "the same command resumes the search"
    status, output = small_search()
    assert status == 0
    assert "best is trial" in output


def test_search_on_object_store_with_temporary_errors_finishes(
    small_search: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One 503 ended it."""
    failed = set()

    class Store(fs.FSSpecHandler):
        """A disk that is used like an object store and fails each first write of a file."""

        def open_output_stream(self, path: str, metadata: object) -> Any:
            if path not in failed:
                failed.add(path)
                raise OSError("AWS Error SLOW_DOWN")
            return super().open_output_stream(path, metadata)

    store = fs.PyFileSystem(Store(LocalFileSystem(auto_mkdir=True)))
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(Folder, "resolve", lambda address: Folder(address, location=(store, address)))
    assert small_search()[0] == 0
    assert {path.rpartition("/it/")[2] for path in failed} >= {"search.toml", "trials.json", "best.toml"}


@pytest.mark.slow
def test_search_with_files_that_the_user_removed_restores_them(
    small_search: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "it"
    assert small_search()[0] == 0
    finished = [path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")]
    for name in ("sample.txt", "best.toml"):
        (folder / name).unlink()
        assert small_search()[0] == 0
        assert (folder / name).exists()
    assert [path.stat().st_mtime_ns for path in folder.glob("trials/*/result.json")] == finished
    shutil.rmtree(folder / "trials" / "00001")
    assert small_search()[0] == 0
    assert (folder / "trials" / "00001" / "result.json").exists()
    for run in (folder / "trials").iterdir():
        shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunFailed, match=r"trials/0000\d: has no checkpoint; remove it to run it again"):
        small_search()


@pytest.mark.slow
def test_search_runs_a_stopped_trial_again_if_its_folder_was_removed(
    small_search: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "it"
    assert small_search()[0] == 0
    shutil.rmtree(folder / "trials")
    stopped = {f"0000{number}": {"state": "stopped", "why": "", "point": {}} for number in range(2)}
    (folder / "trials.json").write_text(json.dumps(stopped))
    assert small_search()[0] == 0
    assert len(list(folder.glob("trials/*/result.json"))) == 2


@pytest.mark.slow
def test_search_whose_trial_is_a_link_to_another_disk_writes_there(
    small_search: Callable[..., Any], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "it" / "trials").mkdir(parents=True)
    (tmp_path / "it" / "trials" / "00001").symlink_to(elsewhere)
    assert small_search()[0] == 0
    assert (elsewhere / "result.json").exists()
    checkpoint = not_none(find_latest_valid(Folder(str(elsewhere / "checkpoints")))[0])
    (elsewhere / "checkpoints" / "of the user").mkdir()
    exchange = Folder(str(tmp_path / "exchange"))
    export_checkpoint(checkpoint, Folder(str(elsewhere)), exchange)
    (elsewhere / "exchanged").unlink()
    import_checkpoint(exchange, Folder(str(tmp_path / "it" / "trials" / "00001")), load_config(None, {}))
    assert {path.name for path in (elsewhere / "checkpoints").iterdir()} == {checkpoint.name, "of the user"}


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"00000": ' + "[" * 100_000, '{"00000": "stopped"}', '{"00000": {"state": []}}', "\udcff"],
)
def test_search_with_damaged_records_is_refused(small_search: Callable[..., Any], tmp_path: Path, content: str) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / TRIALS_FILE).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"it/trials\.json: invalid content; remove it to retry failed trials"):
        small_search()


def test_search_interrupted_while_it_writes_results_completes_them(
    small_search: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to stop, and a search without its results would have to write all again."""

    def plot(trials: Trials) -> bytes:
        os.kill(os.getpid(), signal.SIGINT)
        return plot_curves(trials)

    monkeypatch.setattr("job.tuning.results.plot_curves", plot)
    assert small_search()[0] == 0
    assert (tmp_path / "it" / "best.toml").exists()
    (tmp_path / "it" / "sample.txt").write_bytes(b"\xff")
    assert "is finished" in small_search()[1]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["search.toml", "trials.json", "sample.txt", "trials.parquet", "best.toml"])
def test_search_killed_while_it_writes_a_record_resumes_with_the_same_result(
    small_search: Callable[..., Any], tmp_path: Path, file: str
) -> None:
    assert small_search()[0] == 0
    folder = tmp_path / "it"
    best = (folder / "best.toml").read_bytes()
    shutil.rmtree(folder)
    write = storage._write_local

    class Killed(BaseException):
        pass

    def kill(folder: Path, name: str, data: tuple[Any, ...], check_change: Callable[..., Any]) -> None:
        if name == file:
            (folder / f".{name}.1-1").write_bytes(b"".join(data)[:100])
            raise Killed
        write(folder, name, data, check_change)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(storage, "_write_local", kill)
        small_search()
    assert not (folder / "best.toml").exists()
    assert small_search()[0] == 0
    assert (folder / "best.toml").read_bytes() == best
    assert parquet.read_table(folder / "trials.parquet").column("state").to_pylist() == ["finished"] * 2
