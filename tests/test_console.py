"""What a terminal shows: lines of its width, in its encoding."""

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import job, start_job

from job.config.config_file import load_config
from job.config.schema import Config
from job.console import Console, escape_controls, format_bytes, format_count, format_duration
from job.run.driver import RunOutcome, print_result
from job.run.run_status import RunStatus
from job.storage import Folder
from job.training.events import Started


class Terminal(io.TextIOWrapper):
    """A terminal that keeps the bytes that it is sent."""

    def __init__(self, encoding: str = "utf-8") -> None:
        self.sent = io.BytesIO()
        super().__init__(self.sent, encoding)

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        return self.sent.getvalue().decode(self.encoding).replace("\r", "").replace("\x1b[J", "").splitlines()


NUMBERS = [
    (50, 12_000, 8, 2.1, 250_000.0),
    (10**8, 10**12, 10**11, 699.0, 12_345_678.0),
    (10**400, 10**402, 10**401, math.inf, 0.0),
]


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize(("epochs", "total_steps", "step", "nats", "speed"), NUMBERS, ids=["usual", "large", "huge"])
def test_show_progress_of_any_numbers_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: int, epochs: int, total_steps: int, step: int, nats: float, speed: float
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    status = RunStatus(load_config(None, {"train.epochs": str(epochs)}), Console(terminal))
    status.started = Started("attempt", 0, 0, 1, "CPU", "fp32", 1000, total_steps, ())
    status.show_progress(1, step, nats, speed, "validation ")
    assert max(map(len, terminal.lines)) < columns
    assert " ".join(terminal.lines).endswith("left")
    assert not any(line.endswith(("epoch", "step", "perplexity")) for line in terminal.lines)  # breaks between fields


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize(("epochs", "total_steps", "step", "nats", "speed"), NUMBERS[:2], ids=["usual", "large"])
def test_print_result_of_any_numbers_fits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, columns: int, epochs: int, total_steps: int, step: int, nats: float, speed: float
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    perplexity = math.exp(nats)
    result: dict[str, Any] = {
        "perplexity": perplexity,
        "epochs": epochs,
        "steps": total_steps,
        "seconds": 1e12,
        "workers": 10**6,
    }
    result |= {"generated": "a  b" * 30, "checkpoint": "checkpoints/step-1", "restarts": 0}
    print_result(RunOutcome(Folder("/runs/run-1"), Config(), result), Console(terminal))
    numbers = terminal.lines[: terminal.lines.index("")]
    assert max(map(len, numbers)) < columns
    assert " ".join(numbers).endswith(" workers")
    assert f"    {'a  b' * 30}" in terminal.lines  # neither wrapped nor changed


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_print_replaces_what_the_stream_cannot_encode(encoding: str) -> None:
    terminal = Terminal(encoding)
    console = Console(terminal)
    console.print("→ 中 ü")
    console.print("next")
    replaced = {"ascii": "? ? ?", "latin-1": "? ? ü", "utf-8": "→ 中 ü"}
    assert terminal.lines == [replaced[encoding], "next"]
    assert console.is_tty


def test_format_count_has_at_most_ten_characters() -> None:
    assert format_count(12_345) == "12,345"
    assert max(len(format_count(10**power - 1)) for power in range(320)) <= 10


def test_format_duration_of_any_length_is_short() -> None:
    assert [format_duration(seconds) for seconds in (42, 185, 3723)] == ["42 s", "3:05", "1:02:03"]
    assert format_duration(1e8) == "1,157 days"
    assert format_duration(1e300) == "1.16e+295 days"


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "ascii:ignore"])
def test_commands_replace_what_the_terminal_cannot_encode(tmp_path: Path, encoding: str) -> None:
    env = {"PYTHONIOENCODING": encoding}
    arguments = ["--scale.workers", 0, "--model.hidden_size", 8, "--stream.batch_size", 4, "--train.max_steps", 2]
    corpus = tmp_path / "naïve 中.txt"
    corpus.write_text("die Straße, 中文 → ü " * 300, encoding="utf-8")
    folder = ["--run.storage", tmp_path, "--run.name", "run", "--generate.prefix", "ü"]
    trained = start_job("train", "--corpus.source", corpus, *folder, *arguments, env=env)
    out, err = trained.communicate(timeout=120)
    assert (trained.returncode, err) == (0, "")
    for beginning in ("run run: ", "rnn 8, ", "perplexity ", "curve ", "continue "):
        assert f"\n{beginning}" in f"\n{out}"
    generated = start_job("generate", tmp_path / "run", "--generate.prefix", "ü中", env=env)
    out, err = generated.communicate(timeout=120)
    assert (generated.returncode, err) == (0, "")
    assert out.startswith("??")
    failed = start_job("train", "--run.resume", "中", env=env)
    _, err = failed.communicate(timeout=120)
    assert (failed.returncode, err.count("\n")) == (2, 1)
    assert "\\u4e2d" in err


def test_help_in_ascii_shows_all_lines() -> None:
    ended = start_job("train", "--help", env={"PYTHONIOENCODING": "ascii"})
    out, err = ended.communicate(timeout=60)
    assert (ended.returncode, err) == (0, "")
    assert out.splitlines()[1:] == job("train", "--help").out.encode("ascii", "replace").decode().splitlines()[1:]
    assert "?" in out


HOSTILE = "a\x1b[2Jb\x9b2Jc\x07d\x1b]0;title\x07\re"


@pytest.mark.parametrize("terminal", [Terminal, io.StringIO])
@pytest.mark.parametrize(
    "show",
    [Console.print, Console.warn, Console.progress, lambda console, text: console.redraw([text])],
    ids=["print", "warn", "progress", "redraw"],
)
def test_console_shows_control_characters_of_a_text_escaped(
    monkeypatch: pytest.MonkeyPatch, terminal: type[Terminal | io.StringIO], show: Callable[[Console, str], object]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    stream = terminal()
    show(Console(stream), HOSTILE)
    shown = stream.sent.getvalue().decode() if isinstance(stream, Terminal) else stream.getvalue()
    assert r"a\x1b[2Jb\x9b2Jc\x07d\x1b]0;title\x07" in shown
    assert not {"\x1b", "\x9b", "\x07", "\r"} & set(shown)


def test_escape_controls_keeps_line_ends_tabs_and_other_text() -> None:
    text = "one\ntwo\r\nthree\tnaïve 今天 \U0001f600"
    assert escape_controls(text) == text


def test_error_message_with_content_of_a_file_shows_control_characters_escaped(tmp_path: Path) -> None:
    for text in ('["a\\u001b[2J"]', '[model]\n"\\u009b2J" = 1', '[model]\ncell = "\\u001b[2J:A"'):
        (tmp_path / "a.toml").write_text(text)
        ended = job("train", tmp_path / "a.toml")
        assert ended.status == 2
        assert "\\x" in ended.err or "\\u" in ended.err
        assert not {"\x1b", "\x9b"} & set(ended.err)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1536, "2 KiB"), (3 << 29, "1.5 GiB"), (10**400, "e+290 GiB")],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count).endswith(text)


def draw_progress(monkeypatch: pytest.MonkeyPatch, sample: str, columns: int = 100, **started: Any) -> Terminal:
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    status = RunStatus(load_config(None, {}), Console(terminal))
    status.started = replace(Started("attempt", 0, 0, 2, "cpu", "fp32", 1000, 400, ()), **started)
    status.show_samples([{"prefix": "the", "continuation": sample}] * bool(sample))
    status.show_progress(1, 100, 2.1, 250_000.0)
    return terminal


def test_show_progress_on_a_terminal_draws_a_bar_and_the_last_sample_on_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample, bar = draw_progress(monkeypatch, " end\nnext\ttab\x1b[2J").lines
    assert sample == r"the end\nnext\ttab\x1b[2J"
    assert bar.startswith("[#####---------------]  epoch 1/50  step 100/400  perplexity 8.17  250,000 tokens/s  ")
    (bar,) = draw_progress(monkeypatch, "").lines
    assert bar.startswith("[#####")


@pytest.mark.parametrize("sample", ["word " * 50, "中文" * 100, "é" * 300, "\x1b" * 200])
def test_show_progress_cuts_a_sample_to_the_columns_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch, sample: str
) -> None:
    drawn, _ = draw_progress(monkeypatch, sample).lines
    columns = sum(2 if character in "中文" else 1 for character in drawn)
    assert 97 <= columns <= 99


def test_progress_elsewhere_has_neither_bar_nor_sample() -> None:
    stream = io.StringIO()
    Console(stream).progress("epoch 1/50", 0.5, "a sample")
    assert stream.getvalue() == "epoch 1/50\n"


@pytest.mark.parametrize(
    ("device", "precision", "share"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", "7.58% of peak"),  # 6 · 1e8 · 250,000 / (2 · 989e12)
        ("NVIDIA H100 PCIe", "bf16", "9.92% of peak"),
        ("Tesla T4", "fp32", "926% of peak"),
        ("Tesla T4", "bf16", ""),
        ("cpu (x86_64)", "fp32", ""),
    ],
)
def test_show_progress_has_the_share_of_peak_of_known_gpus(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: str, share: str
) -> None:
    numbers = {"device": device, "precision": precision, "num_multiplied": 10**8}
    (bar,) = draw_progress(monkeypatch, "", 200, **numbers).lines
    assert ("of peak" in bar, share in bar) == (bool(share), True)
