"""What a search records of its trials: parameters, results, the winner, and exchanged checkpoints."""

import io
import json
import math
from pathlib import Path

import pytest
from conftest import is_picture, job, not_none, pictures, search_config
from pyarrow import parquet

from job.config.config_file import load_config
from job.config.toml import config_to_toml, override_config
from job.errors import RunFailed, UserError
from job.run.run_dir import read_existing_run
from job.storage import Folder
from job.training.checkpoint import find_latest_valid
from job.training.progress import perplexity
from job.tuning.exchange import export_checkpoint, forget_exchange, import_checkpoint
from job.tuning.plots import plot_curves
from job.tuning.results import to_parquet
from job.tuning.trials import (
    TRIALS_FILE,
    baseline_params,
    load_trials,
    trial_config,
    trial_folder,
    trial_params,
)


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
