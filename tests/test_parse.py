"""Configuration: what is written is what is read, and what is wrong is told in one helpful line."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.config.schema import (
    SECTIONS,
    Config,
    GenerateConfig,
    OptimizerConfig,
    RunConfig,
    ScaleConfig,
    StreamConfig,
    TrainConfig,
    config_differences,
)
from job.config.toml import check_known_flag, config_from_toml, config_to_toml, load_config
from job.errors import UserError


@given(
    prefix=st.text(min_size=1).filter(lambda text: text.isprintable() or text),
    offset=st.one_of(st.just("random"), st.integers(0, 50), st.lists(st.integers(0, 9), min_size=50, max_size=60)),
    rate=st.floats(1e-30, 1e30),
    reproducible=st.booleans(),
)
def test_toml_reads_back_to_the_same(prefix, offset, rate, reproducible):
    if any(0xD800 <= ord(character) <= 0xDFFF for character in prefix):
        return  # half a surrogate pair is no text
    options = Config(
        generate=GenerateConfig(prefix=prefix),
        stream=StreamConfig(offset=tuple(offset) if isinstance(offset, list) else offset),
        optimizer=OptimizerConfig(learning_rate=rate),
        train=TrainConfig(reproducible=reproducible),
    )
    assert config_from_toml(config_to_toml(options), "here") == options


def test_a_flag_overrides_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[model]\ncell = "gru"\nhidden_size = 7\n[stream]\noffset = [1, 2]\n[train]\nepochs = 2')
    options = load_config(str(path), {"model.cell": "lstm", "train.checkpoint_every": "5s", "run.name": "7"})
    assert (options.model.cell, options.model.hidden_size, options.run.name) == ("lstm", 7, "7")
    assert options.stream.offset == (1, 2)
    assert options.train.checkpoint_seconds == 5


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        ("[modell]", "unknown section [modell]; did you mean model?"),
        ("[model]\nhiden_size = 3", "unknown option model.hiden_size; did you mean model.hidden_size?"),
        ("[train]\nbatch_size = 3", "unknown option train.batch_size; did you mean stream.batch_size?"),
        ('[model]\nhidden_size = "3"', 'model.hidden_size = "3": must be an integer'),
        ("[model]\nhidden_size = true", "model.hidden_size = true: must be an integer"),
        ("[model]\nhidden_size = 0", "model.hidden_size = 0: must be at least 1"),
        ("[optimizer]\nlearning_rate = nan", "learning_rate = nan: must be a finite number"),
        ("[optimizer]\nlearning_rate = -1", "learning_rate = -1.0: must be greater than 0"),
        ("[stream]\nbatch_size = -4", "stream.batch_size = -4: must be at least 1"),
        ('[stream]\noffset = "rnd"', 'stream.offset = "rnd": must be "random"'),
        ("[stream]\noffset = [1, -2]", "stream.offset = [1, -2]: must not be negative"),
        ("[stream]\noffset = [1, 2]", "stream.offset has 2 entries for train.epochs = 50"),
        ("[scale]\nworkers = 40", "scale.workers = 40: each worker needs a lane, and stream.batch_size = 32"),
        ('[scale]\nworkers = "8-2"', 'scale.workers = "8-2": must be an integer, or a range'),
        ("[scale]\nworkers = 9\n[train]\nreproducible = true", "hands out whole lane groups, and there are 8"),
        ('[train]\ncheckpoint_every = "0s"', 'must be steps (200) or seconds ("30s")'),
        ("[run]\nname = '../x'", "run.name"),
        ("model = 3", "model must be a section"),
        ("[model", "not TOML"),
    ],
)
def test_wrong_values_are_told(tmp_path, toml, told):
    path = tmp_path / "a.toml"
    path.write_text(toml)
    with pytest.raises(UserError) as error:
        load_config(str(path), {})
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("model.hiden", "3", "--model.hiden: unknown option model.hiden; did you mean model.hidden_size?"),
        ("hidden_size", "3", "did you mean model.hidden_size?"),
        ("model.hidden_size", "many", 'command line: model.hidden_size = "many": must be an integer'),
        ("train.reproducible", "yes", "must be true or false"),
    ],
)
def test_wrong_flags_are_told(name, text, told):
    with pytest.raises(UserError) as error:
        load_config(None, {name: text})
    assert told in str(error.value)


def test_flags_of_a_search_are_not_for_a_run():
    with pytest.raises(UserError, match=r"--search.trials: is for tune alone"):
        check_known_flag("search.trials", searched=False)
    check_known_flag("search.trials", searched=True)


def test_every_option_says_what_it_means():
    for kind in SECTIONS.values():
        for option in dataclasses.fields(kind):
            assert option.metadata["meaning"]


def test_a_run_goes_on_only_with_the_same_mathematics():
    old = Config()
    free = Config(
        scale=ScaleConfig(workers=7), train=TrainConfig(epochs=60, log_every=5), generate=GenerateConfig(length=3)
    )
    assert config_differences(old, free) == []
    other = Config(run=RunConfig(seed=4), train=TrainConfig(epochs=40))
    assert config_differences(old, other) == ["run.seed (0 → 4)", "train.epochs (50 → 40)"]
