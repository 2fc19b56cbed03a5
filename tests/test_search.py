"""Searches before their trials: the space, its samples, its checks, and what else is refused."""

import contextlib
import io
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import not_none, search_config, start_job
from hypothesis import given
from hypothesis import strategies as st

from job.cluster.connection import connect
from job.config.config_file import load_config, load_search_config
from job.config.run import ScaleConfig
from job.config.search_space import search_differences
from job.config.toml import config_to_toml, override_config, search_config_from_toml
from job.console import Console
from job.errors import UserError
from job.run.run_dir import SEARCH_FILE
from job.storage import Folder
from job.tuning.optuna_sampler import OptunaSampler
from job.tuning.report import display_name
from job.tuning.setup import check_search, resolve_search

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


def test_load_config_reads_a_uri(tmp_path: Path) -> None:
    (tmp_path / "best.toml").write_text('[model]\ncell = "gru"')
    assert load_config(f"file://{tmp_path}/best.toml", {}).model.cell == "gru"
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(f"file://{tmp_path}/worst.toml", {})
