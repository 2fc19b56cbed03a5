"""The configuration: TOML round trips, overrides, and one line per invalid value."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from job.config.compatibility import config_differences
from job.config.config_file import load_config
from job.config.field import ConfigField
from job.config.inference import GenerateConfig
from job.config.run import RunConfig, ScaleConfig
from job.config.schema import Config
from job.config.text import StreamConfig
from job.config.toml import FILE_FIELDS, config_from_toml, config_to_toml, parse_flags
from job.config.training import OptimizerConfig, TrainConfig
from job.errors import UserError
from job.run.run_dir import read_existing_run
from job.storage import Folder


@settings(deadline=None)  # a loaded machine is slow
@given(
    prefix=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    offset=st.one_of(st.just("random"), st.integers(0, 50), st.lists(st.integers(0, 9), min_size=50, max_size=60)),
    rate=st.floats(1e-30, 1e30),
    reproducible=st.booleans(),
)
def test_config_to_toml_any_values_read_back_equal(prefix: str, offset: Any, rate: float, reproducible: bool) -> None:
    config = Config(
        generate=GenerateConfig(prefix=prefix),
        stream=StreamConfig(offset=tuple(offset) if isinstance(offset, list) else offset),
        optimizer=OptimizerConfig(learning_rate=rate),
        train=TrainConfig(reproducible=reproducible),
    )
    assert config_from_toml(config_to_toml(config), "origin") == config


def test_load_config_flags_override_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[model]\ncell = "gru"\nhidden_size = 7\n[stream]\noffset = [1, 2]\n[train]\nepochs = 2')
    config = load_config(str(path), {"model.cell": "lstm", "train.checkpoint_every": "5s", "run.name": "7"})
    assert (config.model.cell, config.model.hidden_size, config.run.name) == ("lstm", 7, "7")
    assert config.stream.offset == (1, 2)
    assert config.train.checkpoint_seconds == 5


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[modell]", "unknown section modell; did you mean model?"),
        ('["mo\\ndel"]', 'unknown section "mo\\ndel"; did you mean model?'),
        ("[model]\nHIDDEN_SIZE = 3", "unknown field model.HIDDEN_SIZE; did you mean model.hidden_size?"),
        ('[model]\nhidden_size = { "a\\nb" = 1 }', 'model.hidden_size = { "a\\nb" = 1 }: must be an integer'),
        ("[model]\nhidden_size = 1979-05-27", "model.hidden_size = 1979-05-27: must be an integer"),
        (f"[train]\nepochs = 0x{'f' * 5000}", "not TOML: an integer of thousands of digits"),
        ("[model]\nhiden_size = 3", "unknown field model.hiden_size; did you mean model.hidden_size?"),
        ("[train]\nbatch_size = 3", "unknown field train.batch_size; did you mean stream.batch_size?"),
        ('[model]\nhidden_size = "3"', 'model.hidden_size = "3": must be an integer'),
        ("[model]\nhidden_size = true", "model.hidden_size = true: must be an integer"),
        ("[model]\nhidden_size = { a = 1 }", "model.hidden_size = { a = 1 }: must be an integer"),
        ("[model]\nhidden_size = 0", "model.hidden_size = 0: must be at least 1"),
        ("[model]\ndropout = 1", "model.dropout = 1.0: must be at least 0 and less than 1"),
        ('[model]\ncell = "grub"', 'model.cell = "grub": must be one of rnn, gru, lstm, mingru, '),
        ("[optimizer]\nlearning_rate = nan", "learning_rate = nan: must be a finite number"),
        ("[optimizer]\nlearning_rate = -1", "learning_rate = -1.0: must be greater than 0"),
        ("[stream]\nbatch_size = -4", "stream.batch_size = -4: must be at least 1"),
        ('[stream]\noffset = "rnd"', 'stream.offset = "rnd": must be "random"'),
        ("[stream]\noffset = [1, -2]", "stream.offset = [1, -2]: must be at least 0"),
        ("[stream]\noffset = [1, 2]", "stream.offset has 2 entries for train.epochs = 50; give one for each epoch"),
        ("[scale]\nworkers = 40", "scale.workers = 40: each worker needs a lane, and stream.batch_size = 32"),
        ('[scale]\nworkers = "8-2"', 'scale.workers = "8-2": must be an integer, or a range'),
        (f'[scale]\nworkers = "1-{"9" * 5000}"', ": must be an integer, or a range"),
        ("[scale]\nworkers = 2.5", "scale.workers = 2.5: must be an integer, or a range"),
        ("[scale]\nworkers = -1", "scale.workers = -1: must be at least 0"),
        ("[scale]\nworkers = 9\n[train]\nreproducible = true", "needs a lane group, and there are 8; lower it or"),
        ('[train]\ncheckpoint_every = "0s"', 'must be steps (200) or seconds ("30s")'),
        ("[run]\nname = '../x'", "run.name"),
        (
            "[optimizer]\nschedule = 'cosine'\nwarmup_steps = 9\nschedule_steps = 9",
            "optimizer.schedule_steps = 9: must be more than optimizer.warmup_steps = 9",
        ),
        ("model = 3", "model must be a section"),
        ("[model", "not TOML"),
    ],
)
def test_load_config_invalid_file_raises_one_line(tmp_path: Path, toml: str, message: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(toml)
    with pytest.raises(UserError) as error:
        load_config(str(path), {})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("model.hiden", "3", "unknown field model.hiden; did you mean model.hidden_size?"),
        ("hidden_size", "3", "unknown field hidden_size; did you mean model.hidden_size?"),
        ("model.hidden_size", "many", 'command line: model.hidden_size = "many": must be an integer'),
        ("model.hidden_size", "", 'command line: model.hidden_size = "": must be an integer'),
        ("model.hidden_size", "3\nx = 4", 'model.hidden_size = "3\\nx = 4": must be an integer'),
        ("train.epochs", f"0x{'f' * 5000}", "must be an integer"),
        ("train.reproducible", "yes", "must be true or false"),
        ("generate.prefix", "\udcff", "contains bytes that are not UTF-8"),
    ],
)
def test_load_config_invalid_flag_raises_one_line(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, {name: text})
    assert message in str(error.value)


def test_load_config_invalid_value_names_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[model]\nhidden_size = 0")
    with pytest.raises(UserError, match=r"a\.toml: model\.hidden_size = 0: must be at least 1"):
        load_config(str(path), {"model.hidden_size": "3"})
    path.write_text("[model]\nhidden_size = 3")
    with pytest.raises(UserError, match=r"^command line: model\.hidden_size = 0: must be at least 1"):
        load_config(str(path), {"model.hidden_size": "0"})


def test_parse_flags_unquoted_text_is_a_string() -> None:
    flags = {"run.name": "7", "model.hidden_size": "7", "stream.offset": "random", "train.checkpoint_every": "30s"}
    assert parse_flags(flags) == {
        "run.name": "7",
        "model.hidden_size": 7,
        "stream.offset": "random",
        "train.checkpoint_every": "30s",
    }


@pytest.mark.parametrize("option", FILE_FIELDS.values(), ids=lambda option: option.name)
def test_config_field_is_declared_completely(option: ConfigField) -> None:
    assert option.meaning
    assert option.form or len(option.types) == 1
    assert option.validate(option.default) == option.default


def test_config_differences_lists_what_prevents_a_resume() -> None:
    old = Config()
    compatible = Config(
        scale=ScaleConfig(workers=7), train=TrainConfig(epochs=60, log_every=5), generate=GenerateConfig(length=3)
    )
    assert config_differences(old, compatible) == []
    different = Config(run=RunConfig(seed=4), train=TrainConfig(epochs=40))
    assert config_differences(old, different) == ["run.seed (0 → 4)", "train.epochs (50 → 40)"]


def test_config_differences_longer_offset_list_is_compatible() -> None:
    old = Config(stream=StreamConfig(offset=(1, 2)), train=TrainConfig(epochs=2))
    longer = Config(stream=StreamConfig(offset=(1, 2, 3)), train=TrainConfig(epochs=3))
    other = Config(stream=StreamConfig(offset=(1, 3)), train=TrainConfig(epochs=2))
    assert config_differences(old, longer) == []
    assert config_differences(old, other) == ["stream.offset ([1, 2] → [1, 3])"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("prefix", ["", "file://"])
def test_load_config_with_byte_order_mark_equals_without(tmp_path: Path, encoding: str, prefix: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""  # Python adds that of the other two itself
    path = tmp_path / "config.toml"
    path.write_bytes(f'{mark}[generate]\r\nprefix = "über"\r\n'.encode(encoding))
    assert load_config(f"{prefix}{path}", {}).generate.prefix == "über"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("[train]\n# é".encode("latin-1"), "not utf-8 text at byte 10"),
        (b"\x80", "not utf-8 text at byte 0"),
        (b"\xff\xfe[\0]", "not utf-16-le text at byte 4"),
    ],
)
def test_load_config_in_another_encoding_names_place_and_remedy(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(data)
    with pytest.raises(UserError) as raised:
        load_config(str(path), {})
    assert str(raised.value) == f"{path}: {problem}; convert it to UTF-8"


def test_read_existing_run_with_byte_order_mark_equals_without(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xef\xbb\xbf" + config_to_toml(Config()).encode())
    existing = read_existing_run(Folder(str(tmp_path)))
    assert existing
    assert existing.config == Config()


@pytest.mark.parametrize(
    ("optimizer", "is_compatible"),
    [
        (OptimizerConfig(schedule="cosine"), False),
        (OptimizerConfig(schedule="cosine", warmup_steps=50), False),
        (OptimizerConfig(schedule="cosine", schedule_steps=90), True),
        (OptimizerConfig(warmup_steps=50), True),
    ],
)
def test_config_differences_more_epochs_are_compatible_unless_the_schedule_spans_them(
    optimizer: OptimizerConfig, is_compatible: bool
) -> None:
    old = Config(optimizer=optimizer, train=TrainConfig(epochs=2))
    longer = replace(old, train=TrainConfig(epochs=4))
    message = "train.epochs (2 → 4), the schedule's length unless optimizer.schedule_steps is set"
    assert config_differences(old, longer) == ([] if is_compatible else [message])
    assert config_differences(old, replace(old, train=TrainConfig(epochs=2, max_steps=7))) == []
