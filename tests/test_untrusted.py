"""Files that others may have written: a run, a checkpoint, a search's trial. None of them may execute code."""

import hashlib
import json
import sys

import pytest
from conftest import job
from test_command_line import SMALL, assert_user_error

from job.config.config_file import load_search_config
from job.errors import UserError
from job.inference.generate import generate_text
from job.run.run_dir import open_checkpoint
from job.storage import Folder
from job.tuning.trials import load_trials

EVIL = "evil:Cell"


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """Makes the module ``evil`` importable; returns whether it was imported."""
    (tmp_path / "evil.py").write_text("from torch.nn import RNN as Cell")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return lambda: "evil" in sys.modules


def name_cell(checkpoint, cell):
    """Writes another cell into a checkpoint's configuration, and the manifest that fits."""
    path = checkpoint / "config.toml"
    path.write_text(path.read_text().replace('cell = "rnn"', f'cell = "{cell}"'))
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    data, content = path.read_bytes(), manifest["content"]
    content["files"]["config.toml"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def run(prose, tmp_path):
    """The folder of a run whose checkpoint names a cell to import."""
    arguments = [*SMALL, "--corpus.source", prose, "--run.storage", tmp_path, "--run.name", "run"]
    ended = job("train", *arguments)
    assert ended.status == 0, ended.err
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        name_cell(checkpoint, EVIL)
    return tmp_path / "run"


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_checkpoint_with_custom_cell_is_refused_unless_the_user_names_the_cell(run, evil, verb):
    checkpoint = max((run / "checkpoints").iterdir())
    for target in (run, checkpoint):
        ended = assert_user_error(job(verb, target), f"model.cell = {EVIL}", f"add --model.cell {EVIL}")
        assert_user_error(job(verb, target, "--model.cell", "rnn"), f"this checkpoint's is {EVIL}")
        assert_user_error(job(verb, target, "--model.cell", "other:Cell"), f"this checkpoint's is {EVIL}")
        assert not evil(), ended
    ended = job(verb, run, "--model.cell", EVIL)
    assert ended.status == 0, ended.err
    assert evil()


def test_train_on_files_that_name_a_cell_does_not_import_it(run, evil, prose):
    arguments = [*SMALL, "--corpus.source", prose, "--run.storage", run.parent]
    initialized = job("train", *arguments, "--run.name", "second", "--model.init", run)
    resumed = job("train", *arguments, "--run.name", "run", "--train.epochs", 3)
    assert (initialized.status, resumed.status) == (0, 0), initialized.err + resumed.err
    config = run / "config.toml"
    config.write_text(config.read_text().replace('cell = "rnn"', f'cell = "{EVIL}"'))
    assert_user_error(job("train", *arguments, "--run.name", "run"), f'model.cell ("{EVIL}" → "rnn")')
    assert not evil()


def test_generate_text_with_configuration_of_the_user_does_not_import_the_stored_cell(run, evil):
    """As a driver does when its run has ended."""
    loaded = open_checkpoint(Folder(str(run)))
    config, _ = load_search_config(None, {})
    with pytest.raises(UserError, match="code named by a file is not imported"):
        generate_text(loaded, config)
    assert not evil()


def test_load_trials_with_a_cell_outside_the_search_raises_user_error(run, tmp_path):
    (tmp_path / "search" / "trials").mkdir(parents=True)
    config = run / "config.toml"
    config.write_text(config.read_text().replace('cell = "rnn"', f'cell = "{EVIL}"'))
    run.rename(tmp_path / "search" / "trials" / "00000")
    path = tmp_path / "search.toml"
    for domain in ('"optimizer.learning_rate" = { grid = [1, 2] }', '"model.cell" = { grid = ["rnn", "gru"] }'):
        path.write_text(f"[search.space]\n{domain}")
        base, search = load_search_config(str(path), {})
        with pytest.raises(UserError, match="is not a cell of this search"):
            load_trials(Folder(str(tmp_path / "search")), base, search)


def test_run_with_custom_cell_prints_the_command_that_generates(prose, tmp_path):
    arguments = [*SMALL, "--corpus.source", prose, "--run.storage", tmp_path, "--run.name", "run"]
    ended = job("train", *arguments, "--model.cell", "torch.nn:GRU")
    assert f"generate {tmp_path}/run --model.cell torch.nn:GRU --generate.prefix" in ended.out
    assert job("generate", tmp_path / "run", "--model.cell", "torch.nn:GRU").status == 0
