"""What a search is, before any trial runs: the space, its points, and what is refused."""

import io

import pytest
from conftest import job
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from job.config.config_file import load_config, load_search_config
from job.config.search_space import SearchConfig, search_differences
from job.config.toml import override_config, search_config_from_toml, search_config_to_toml
from job.console import Console
from job.errors import UserError
from job.run.run_dir import SEARCH_FILE, read_existing_run
from job.storage import Folder
from job.training.checkpoint import find_latest_valid
from job.tuning.optuna_sampler import OptunaSampler
from job.tuning.report import metric_name, to_parquet
from job.tuning.trials import (
    TRIALS_FILE,
    Trials,
    baseline_params,
    check_search,
    export_checkpoint,
    import_checkpoint,
    resolve_search,
    trial_params,
    with_params,
)

SPACE = {
    "optimizer.learning_rate": {"loguniform": [0.01, 4]},
    "model.dropout": {"uniform": [0, 0.5]},
    "model.hidden_size": {"randint": [8, 32]},
    "optimizer.name": {"choice": ["sgd", "adamw"]},
    "model.cell": {"grid": ["rnn", "gru", "lstm"]},
}


@given(seed=st.integers(0, 2**63), number=st.integers(0, 10**6))
def test_a_point_is_a_pure_function_that_stays_in_its_space(seed, number):
    space = SearchConfig(space=SPACE).space
    point = space.sample(seed, number)
    assert point == space.sample(seed, number)
    assert 0.01 <= point["optimizer.learning_rate"] <= 4
    assert 0 <= point["model.dropout"] <= 0.5
    assert point["model.hidden_size"] in range(8, 33)
    assert point["optimizer.name"] in ("sgd", "adamw")
    assert point["model.cell"] == ("rnn", "gru", "lstm")[number % 3]
    options = with_params(load_config(None, {}), point)
    assert (options.model.cell, options.optimizer.learning_rate) == (
        point["model.cell"],
        point["optimizer.learning_rate"],
    )


def test_a_field_is_drawn_whatever_else_is_searched():
    alone = SearchConfig(space={"model.dropout": SPACE["model.dropout"]}).space
    assert alone.sample(3, 5)["model.dropout"] == SearchConfig(space=SPACE).space.sample(3, 5)["model.dropout"]


def test_a_grid_is_gone_through_once():
    wanted = SearchConfig(
        searcher="grid", space={"model.cell": SPACE["model.cell"], "model.num_layers": {"choice": [1, 2]}}
    )
    points = [tuple(wanted.space.sample(0, number).values()) for number in range(wanted.num_trials)]
    assert points == [("rnn", 1), ("rnn", 2), ("gru", 1), ("gru", 2), ("lstm", 1), ("lstm", 2)]


def test_how_many_trials():
    assert SearchConfig(space=SPACE).num_trials == 16
    assert SearchConfig(space=SPACE, trials=40).num_trials == 40
    assert SearchConfig(space={"model.cell": SPACE["model.cell"]}, trials=40).num_trials == 3
    assert SearchConfig(space={"model.cell": SPACE["model.cell"]}, trials=2).num_trials == 2


def test_toml_reads_back_to_the_same():
    wanted = SearchConfig(trials=7, scheduler="asha", space=SPACE)
    base = load_config(None, {"model.cell": "gru"})
    text = search_config_to_toml(base, wanted)
    assert search_config_from_toml(text, "here") == (base, wanted)
    assert search_differences(wanted, SearchConfig(trials=9, scheduler="asha", space=SPACE)) == []
    other = SearchConfig(trials=7, space={**SPACE, "model.dropout": {"uniform": [0, 0.9]}})
    assert search_differences(wanted, other) == [
        'search.scheduler ("asha" → "none")',
        "search.space model.dropout ({ uniform = [0.0, 0.5] } → { uniform = [0.0, 0.9] })",
    ]


def test_train_takes_the_same_file_and_leaves_the_search_aside(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(
        '[model]\ncell = "gru"\n[search]\ntrials = 3\n[search.space]\n"model.dropout" = { uniform = [0, 0.5] }'
    )
    assert load_config(str(path), {}) == load_config(None, {"model.cell": "gru"})
    options, wanted = load_search_config(str(path), {"search.trials": "5"})
    assert (options.model.cell, wanted.trials, list(wanted.space.domains)) == ("gru", 5, ["model.dropout"])


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("[search]\ntrails = 3", "unknown field search.trails; did you mean search.trials?"),
        ('[search]\nsearcher = "random2"', 'search.searcher = "random2": must be one of random, grid, optuna'),
        ('[search]\nscheduler = "asa"', 'search.scheduler = "asa": must be one of none, asha, pbt'),
        ('[search]\nmetric = "loss"', 'search.metric = "loss": must be one of validation_perplexity, perplexity'),
        ("[search]\ntrials = -1", "search.trials = -1: must be at least 0"),
        ("[search]\nspace = 3", "search.space must be a section"),
        ("[search.space]\n'model.hiden_size' = { choice = [3] }", "model.hiden_size; did you mean model.hidden_size?"),
        ("[search.space]\n'scale.workers' = { choice = [1, 2] }", "scale.workers does not affect the result of a run"),
        ("[search.space]\n'model.dropout' = 3", "must be one of { uniform = […] }"),
        ("[search.space]\n'model.dropout' = { unifrom = [0, 1] }", "must be one of { uniform = […] }"),
        ("[search.space]\n'model.dropout' = { uniform = [0.5, 0.1] }", "the range is empty or not finite"),
        ("[search.space]\n'model.dropout' = { uniform = [0.5] }", "must be two numbers, low and high"),
        ("[search.space]\n'model.dropout' = { loguniform = [0, 0.5] }", "log-uniform range must be greater than 0"),
        ("[search.space]\n'model.hidden_size' = { randint = [1.5, 8] }", "must be two integers"),
        ("[search.space]\n'model.cell' = { choice = [] }", "must contain a list of values"),
        ("[search.space]\n'model.cell' = { choice = ['rnn', 'rnn'] }", "contains a value twice"),
        ("[search]\nsearcher = 'grid'\n[search.space]\n'model.dropout' = { uniform = [0, 1] }", "is not a list"),
        ("[search]\nscheduler = 'pbt'\n[search.space]\n'model.init' = { choice = ['rnn'] }", "cannot change"),
        ("[search]\nscheduler = 'pbt'\nsearcher = 'optuna'", "not possible with scheduler"),
    ],
)  # fmt: skip
def test_wrong_searches_are_told_by_every_verb(tmp_path, toml, told):
    path = tmp_path / "a.toml"
    path.write_text(toml)
    with pytest.raises(UserError) as error:
        load_config(str(path), {})
    assert told in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


NOT_VALIDATED = {"corpus.validation_fraction": "0"}


@pytest.mark.parametrize(
    ("wanted", "flags", "told"),
    [
        (SearchConfig(), {}, "nothing to search: write [search.space]"),
        ({"optimizer.learning_rate": {"uniform": [-1, 1]}}, {}, "learning_rate = -1.0: must be greater than 0"),
        ({"model.hidden_size": {"uniform": [8, 16]}}, {}, "model.hidden_size = 8.0: must be an integer"),
        ({"model.cell": {"grid": ["rnn", "gruu"]}}, {}, "model.cell = \"gruu\": must be one of rnn, gru, lstm"),
        ({"stream.batch_size": {"randint": [8, 9000]}}, {}, "at stream.batch_size = 9000: stream.batch_size = 9000"),
        ({"model.dropout": {"uniform": [0, 0.5]}}, NOT_VALIDATED, "is never reported"),
    ],
)  # fmt: skip
def test_what_no_trial_could_run_is_told_before_the_first(prose, tmp_path, wanted, flags, told):
    wanted = wanted if isinstance(wanted, SearchConfig) else SearchConfig(space=wanted)
    flags = {"corpus.source": str(prose), "corpus.validation_fraction": "0.1", "generate.prefix": "the", **flags}
    with pytest.raises(UserError) as error:
        check_search(load_config(None, flags), wanted, Folder(str(tmp_path / "search")))
    assert told in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_is_told(tmp_path):
    wanted = SearchConfig(space={"model.dropout": {"uniform": [0, 0.5]}})
    options = load_config(None, {"run.storage": str(tmp_path), "run.name": "it"})
    folder, placed = resolve_search(options, wanted, "")
    folder.write(SEARCH_FILE, search_config_to_toml(placed, wanted).encode())
    assert resolve_search(options, wanted, "") == (folder, placed)
    with pytest.raises(UserError, match=r"is another search: optimizer\.name"):
        resolve_search(override_config(options, {"optimizer": {"name": "adamw"}}), wanted, "")
    Folder(str(tmp_path / "run")).write("config.toml", b"")
    with pytest.raises(UserError, match="is a run and not a search"):
        resolve_search(override_config(options, {"run": {"name": "run"}}), wanted, "")


def test_optuna_is_asked_told_and_reminded():
    pytest.importorskip("optuna")

    space = SearchConfig(space=SPACE).space
    first = OptunaSampler(space, 3)
    points = [first.ask(number) for number in range(12)]
    assert points == [OptunaSampler(space, 3).ask(0), *points[1:]]
    for number, point in enumerate(points):
        with_params(load_config(None, {}), point)
        first.tell(number, None if number == 3 else point["model.dropout"])
    again = OptunaSampler(space, 3)
    for number, point in enumerate(points):
        again.replay(number, point)
        again.tell(number, None if number == 3 else point["model.dropout"])
    assert again.study.best_value == first.study.best_value
    assert again.ask(12) == first.ask(12)
    assert again.ask(13) not in points


def test_fields_may_be_written_without_quotes():
    plain = SearchConfig(space={"optimizer": {"learning_rate": SPACE["optimizer.learning_rate"]}})
    assert plain == SearchConfig(space={"optimizer.learning_rate": SPACE["optimizer.learning_rate"]})


def test_a_range_of_numbers_may_be_searched_where_the_configuration_has_a_word():
    wanted = SearchConfig(space={"stream.offset": {"randint": [0, 40]}})
    assert baseline_params(load_config(None, {}), wanted) is None
    assert trial_params(load_config(None, {}), wanted, 0)["stream.offset"] in range(41)


def test_values_of_several_types_find_room_in_one_column(tmp_path):
    wanted = SearchConfig(space={"stream.offset": {"grid": ["random", 0, [1, 2]]}})
    table = to_parquet(Trials(Folder(str(tmp_path)), load_config(None, {}), wanted))
    values = parquet.read_table(io.BytesIO(table)).column("stream.offset").to_pylist()
    assert values == ['"random"', "0", "[1, 2]"]


def test_what_a_trial_gave_or_took_last_does_not_take_it_back(prose, tmp_path):
    """Its process died: Ray Tune brings the checkpoint that it knows, and the run is further."""
    flags = ["--corpus.source", prose, "--run.storage", tmp_path, "--scale.workers", 0, "--generate.prefix", "the"]
    flags += ["--model.hidden_size", 8, "--run.name", "run"]
    assert job("train", *flags, "--train.max_steps", 10).status == 0
    run, between = Folder(str(tmp_path / "run")), Folder(str(tmp_path / "between"))
    loaded, _ = find_latest_valid(run / "checkpoints")
    export_checkpoint(loaded.checkpoint, run, between)
    assert job("train", *flags, "--train.max_steps", 20).status == 0
    import_checkpoint(between, run, read_existing_run(run).config)
    assert find_latest_valid(run / "checkpoints")[0].checkpoint.step == 20
    explored = with_params(read_existing_run(run).config, {"optimizer.learning_rate": 0.5})
    import_checkpoint(between, run, explored)
    assert find_latest_valid(run / "checkpoints")[0].checkpoint.step == 10
    assert read_existing_run(run).config == explored


def test_a_table_that_moves_is_taken_back():
    class Terminal:
        text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return True

    terminal = Terminal()
    console = Console(terminal)
    console.redraw(["a", "b", "c"])
    console.print("stays")
    assert terminal.text == "a\nb\nc\r\x1b[2A\x1b[Jstays\n"
    assert metric_name("validation_perplexity") == "validation perplexity"


def test_the_order_of_lines_does_not_matter():
    """A search goes on with its file's lines in another order: no trial changes its point."""
    grids = {"model.cell": {"grid": ["rnn", "gru"]}, "model.hidden_size": {"grid": [8, 16]}}
    one, other = SearchConfig(space=grids), SearchConfig(space=dict(reversed(grids.items())))
    assert search_differences(one, other) == []
    assert [one.space.sample(0, number) for number in range(4)] == [
        other.space.sample(0, number) for number in range(4)
    ]


def test_how_trials_ended_is_kept_also_of_those_not_asked_for(tmp_path):
    space = {"optimizer.learning_rate": {"loguniform": [0.01, 4]}}
    base, folder = load_config(None, {}), Folder(str(tmp_path))
    all_four = Trials(folder, base, SearchConfig(trials=4, space=space))
    for number in range(4):
        all_four.begin(number, all_four.found[number].point)
        all_four.end(number, "stopped")
    one = Trials(folder, base, SearchConfig(trials=1, space=space))
    one.end(0, "failed", "its process died")
    again = Trials(folder, base, SearchConfig(trials=4, space=space))
    assert [trial.state for trial in again] == ["failed", "stopped", "stopped", "stopped"]
    (tmp_path / TRIALS_FILE).write_text("[")
    with pytest.raises(UserError, match="not a record of trials"):
        Trials(folder, base, SearchConfig(trials=4, space=space))


def test_a_configuration_may_lie_on_any_file_system(tmp_path):
    (tmp_path / "best.toml").write_text('[model]\ncell = "gru"')
    assert load_config(f"file://{tmp_path}/best.toml", {}).model.cell == "gru"
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(f"file://{tmp_path}/worst.toml", {})
