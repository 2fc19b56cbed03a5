"""Reports: their numbers are those of the runs, bad input is one line, and the page works in a browser."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import PHONE, WatchedPage, open_page
from conftest import ROOT, Ended, job, not_none, result
from playwright.sync_api import Browser

from job.config.inference import EvaluateConfig
from job.config.model import ModelConfig
from job.data.vocabulary import Vocabulary
from job.inference.evaluate import evaluate_tokens
from job.inference.generate import load_model
from job.nn.language_model import LanguageModel, build_model
from job.report.curves import MAX_POINTS, decimate, find_events, read_curves
from job.report.run_data import MAX_SAMPLES
from job.report.text_losses import NUM_ALTERNATIVES, NUM_CHARACTERS, compute_losses
from job.run.metrics import restart_steps
from job.run.run_dir import open_checkpoint
from job.run.setup import read_dataset
from job.storage import Folder

ATTACK = "<script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>"
SHORT = ["--scale.workers", 0, "--model.hidden_size", 16, "--generate.prefix", "the", "--generate.length", 20]


def train(storage: Path, name: str, corpus: Path, *flags: object) -> Path:
    ended = job("train", *SHORT, "--corpus.source", corpus, "--run.storage", storage, "--run.name", name, *flags)
    assert (ended.status, ended.err) == (0, "")
    return storage / name


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with two runs on a corpus that contains HTML; the second one was resumed once."""
    folder = tmp_path_factory.mktemp("report")
    corpus = folder / "corpus.txt"
    corpus.write_text(f"the time </script> machine {ATTACK} of light\n" * 400)
    flags = ["--corpus.validation_fraction", 0.2, "--corpus.cleaning", "none", "--train.log_every", 1]
    runs = folder / "runs"
    train(runs, "first", corpus, *flags, "--train.max_steps", 8)
    for steps in (4, 8):
        train(runs, "second", corpus, *flags, "--train.max_steps", steps, "--model.cell", "gru")
    samples = [
        {"step": step, "epoch": 1, "kind": kind, "prefix": ATTACK, "continuation": f"</script> at {step}", "time": 1.0}
        for step in range(1, 101)
        for kind in ("greedy", "sampled")
    ]
    (runs / "second" / "samples.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    shutil.move(runs / "second", runs / ATTACK.partition("</")[0])
    return runs


def attacked_run(storage: Path) -> Path:
    return storage / ATTACK.partition("</")[0]


def report_data(page: Path) -> dict[str, Any]:
    """The data that a page contains."""
    _, _, rest = page.read_text().partition('<script type="application/json" id="data">')
    return json.loads(rest.partition("</script>")[0])


def check_refused(ended: Ended, *words: str) -> None:
    assert ended.status == 2
    assert ended.out == ""
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1
    assert not [word for word in words if word not in ended.err], ended.err


# --- numbers ---


def test_decimate_keeps_ends_and_extremes() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[[12_345, 77_777]] = 99, -99
    kept = decimate(values, MAX_POINTS)
    assert len(kept) <= MAX_POINTS
    assert {0, 12_345, 77_777, 99_999} <= set(kept)
    assert (np.diff(kept) > 0).all()
    assert decimate(values[:MAX_POINTS], MAX_POINTS).tolist() == list(range(MAX_POINTS))


def test_events_are_restarts_and_changes_of_workers() -> None:
    rows = [{"step": step, "workers": 2 if step < 7 else 4} for step in range(1, 10)]
    events = find_events(rows, [4, 7])
    assert [(row["step"], kind, text) for row, kind, text in events] == [
        (4, "restart", "restart"),
        (7, "resize", "2 → 4 workers"),
    ]


def test_restart_is_at_the_first_step_after_the_checkpoint(storage: Path) -> None:
    assert restart_steps(Folder(str(storage / "first"))) == []
    assert restart_steps(Folder(str(attacked_run(storage)))) == [5]
    (event,) = read_curves(Folder(str(attacked_run(storage))))["events"]
    assert (event["step"], event["kind"]) == (5, "restart")


@pytest.mark.parametrize("kind", ["char", "word", "byte"])
def test_losses_of_text_are_those_of_evaluation(prose: Path, tmp_path: Path, kind: str) -> None:
    flags = ["--vocabulary.kind", kind, "--corpus.max_tokens", 2000, "--corpus.validation_fraction", 0.4]
    run = train(tmp_path, "run", prose, *flags, "--train.max_steps", 1, "--stream.batch_size", 4)
    loaded = open_checkpoint(Folder(str(run)))
    dataset = read_dataset(loaded.config, known=loaded.vocabulary).dataset
    assert dataset.metadata == read_dataset(loaded.config).dataset.metadata  # which has the digest of the tokens
    tokens = dataset.validation_tokens[:151]
    model = load_model(loaded)
    rows = compute_losses(model, loaded.vocabulary, tokens)
    expected = evaluate_tokens([model], tokens, EvaluateConfig(lanes=1))
    assert sum(nats for _, nats, _ in rows) == pytest.approx(expected, abs=150 * 1e-4)
    assert (
        "".join(text for text, _, _ in rows).strip()
        == loaded.vocabulary.decode(np.asarray(tokens[1:]).tolist()).strip()
    )
    for text, nats, alternatives in rows:
        shares = [share for _, share in alternatives]
        assert len(shares) == NUM_ALTERNATIVES and shares == sorted(shares, reverse=True)
        if text.rstrip(" ") in dict(alternatives):
            assert dict(alternatives)[text.rstrip(" ")] == pytest.approx(np.exp(-nats), abs=2e-4)


def test_losses_of_bytes_that_are_no_characters_show_their_values() -> None:
    model, tokens = build_model(ModelConfig(hidden_size=4), 256, 0), np.array([65, *"é\a\n<".encode()])
    rows = compute_losses(model, Vocabulary("byte", ()), tokens)
    assert [text for text, _, _ in rows] == [r"\xc3", r"\xa9", r"\x07", "\n", "<"]
    assert "\ufffd" not in {name for _, _, alternatives in rows for name, _ in alternatives}


def test_losses_end_after_the_characters_that_are_shown(storage: Path) -> None:
    loaded = open_checkpoint(Folder(str(storage / "first")))
    tokens = np.zeros(5 * NUM_CHARACTERS, np.int32)
    vocabulary = Vocabulary("word", ("<unk>", *(f"word{number}" for number in range(len(loaded.vocabulary) - 1))))
    rows = compute_losses(load_model(loaded), vocabulary, tokens)
    assert NUM_CHARACTERS <= sum(len(text) for text, _, _ in rows) < 1.5 * NUM_CHARACTERS


def test_report_has_the_figures_differences_and_samples_of_the_runs(storage: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    ended = job("report", storage / "first", attacked_run(storage), "--output", page)
    assert (ended.status, ended.out, ended.err) == (0, f"{page}\n", "")
    data = report_data(page)
    first, second = data["runs"]
    assert data["differences"] == ["model.cell"]
    for run, folder in ((first, storage / "first"), (second, attacked_run(storage))):
        assert run["figures"]["perplexity"] == result(folder)["perplexity"]
        assert run["curves"]["training"]["step"] == list(range(1, 9))
        assert run["text"]["step"] == 8
        assert len(run["text"]["tokens"]) == NUM_CHARACTERS
    sample = (storage / "first" / "sample.txt").read_text()
    assert [(each["step"], each["continuation"]) for each in first["samples"]] == [(8, sample)]
    greedy = [each["step"] for each in second["samples"] if each["kind"] == "greedy"]
    assert len(greedy) == MAX_SAMPLES and (greedy[0], greedy[-1]) == (1, 100)
    assert data == {**report_data(storage / "first" / "report.html"), **data}


@pytest.mark.slow
def test_report_of_twenty_long_runs_is_small(storage: Path, tmp_path: Path) -> None:
    """More rows than are shown make no larger file."""
    row = json.loads((storage / "first" / "metrics.jsonl").read_text().splitlines()[0])
    noise = np.random.default_rng(0).uniform(1, 9, 2 * MAX_POINTS)
    lines = [
        json.dumps({**row, "split": split, "step": step, "perplexity": value, "learning_rate": value})
        for step, value in enumerate(noise.tolist(), 1)
        for split in ("train", "validation")
    ]
    for number in range(20):
        shutil.copytree(storage / "first", tmp_path / f"run-{number}")
        (tmp_path / f"run-{number}" / "metrics.jsonl").write_text("\n".join(lines))
    ended = job("report", *(tmp_path / f"run-{number}" for number in range(20)), "--output", tmp_path / "page.html")
    assert ended.status == 0, ended.err
    assert (tmp_path / "page.html").stat().st_size < 10e6
    runs = report_data(tmp_path / "page.html")["runs"]
    assert max(len(curve["value"]) for run in runs for curve in run["curves"].values()) <= MAX_POINTS
    assert sum("tokens" in (run["text"] or {}) for run in runs) == 6


# --- at the end of a run ---


def test_train_stopped_and_resumed_writes_report_each_time(prose: Path, tmp_path: Path) -> None:
    flags = ["--corpus.max_tokens", 4000, "--train.log_every", 1]
    for steps in (1, 2):
        run = train(tmp_path, "run", prose, *flags, "--train.max_steps", steps)
        assert report_data(run / "report.html")["runs"][0]["figures"]["steps"] == steps
    assert "no validation text" in report_data(run / "report.html")["runs"][0]["text"]["reason"]
    changed_at = (run / "report.html").stat().st_mtime_ns
    train(tmp_path, "run", prose, *flags, "--train.max_steps", 2)
    assert (run / "report.html").stat().st_mtime_ns == changed_at


def test_train_whose_report_cannot_be_written_is_finished(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Folder.write

    def fail(folder: Folder, name: str, *parts: bytes) -> None:
        if name == "report.html":
            raise OSError(28, "No space left on device")
        write(folder, name, *parts)

    monkeypatch.setattr(Folder, "write", fail)
    arguments = ["--corpus.source", prose, "--corpus.max_tokens", 4000, "--run.storage", tmp_path, "--run.name", "run"]
    ended = job("train", *SHORT, *arguments, "--train.max_steps", 1)
    assert (ended.status, ended.err) == (0, "")
    assert "report.html was not written: [Errno 28] No space left" in " ".join(ended.out.split())
    assert result(tmp_path / "run")["steps"] == 1


def test_train_without_plotting_library_prints_how_to_install_it(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.report.page.find_spec", lambda name: None)
    arguments = ["--corpus.source", prose, "--corpus.max_tokens", 4000, "--run.storage", tmp_path, "--run.name", "run"]
    ended = job("train", *SHORT, *arguments, "--train.max_steps", 1)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines()[-1] == "report: pip install 'lanes[report]'"
    check_refused(job("report", tmp_path / "run"), "pip install 'lanes[report]'")


# --- bad input ---


def test_report_of_bad_input_is_refused_in_one_line(storage: Path, tmp_path: Path) -> None:
    first = storage / "first"
    check_refused(job("report"), "the folder of a run or search is missing")
    check_refused(job("report", tmp_path / "missing"), f"{tmp_path}/missing: contains neither a run nor a search")
    check_refused(job("report", first, "--output", tmp_path / "none" / "a.html"), f"{tmp_path}/none: no such folder")
    check_refused(job("report", first, "--output", tmp_path), f"{tmp_path}: is a folder")
    os.mkfifo(tmp_path / "pipe")
    check_refused(job("report", first, "--output", tmp_path / "pipe"), f"{tmp_path}/pipe: is a device or pipe")
    check_refused(job("report", first, "--model.cell", "gru"), "model.cell")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(first / "config.toml", empty)
    check_refused(job("report", empty), f"{empty}: has no metrics yet")
    check_refused(job("report", first, empty, "--output", tmp_path / "a.html"), f"{empty}: has no metrics yet")
    (empty / "config.toml").write_text("[model\n")
    check_refused(job("report", empty), "config.toml")
    search = tmp_path / "search"
    search.mkdir()
    (search / "search.toml").write_text((ROOT / "configs" / "tune.toml").read_text())
    check_refused(job("report", search), f"{search}: no trial of this search has a result yet")
    assert not list(tmp_path.glob("*.html"))


def test_report_of_damaged_files_shows_what_is_complete(storage: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(storage / "first", run)
    rows, _, last = (run / "metrics.jsonl").read_text().rstrip().rpartition("\n")
    (run / "metrics.jsonl").write_text(f"{rows}\n[1]\n{last[:20]}")
    (run / "result.json").write_text("{")
    (run / "samples.jsonl").write_bytes(b'{"step": 1}\n\xff\n')
    shutil.rmtree(run / "checkpoints")
    assert job("report", run).status == 0
    (described,) = report_data(run / "report.html")["runs"]
    assert described["state"] == "unfinished"
    assert described["curves"]["training"]["step"][:7] == list(range(1, 8))
    assert "neither a run with a checkpoint" in described["text"]["reason"]
    assert [sample["kind"] for sample in described["samples"]] == ["greedy"]


def test_report_of_diverged_run_leaves_out_what_is_not_finite(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(storage / "first", run)
    (run / "result.json").write_text(json.dumps({**result(run), "perplexity": float("inf"), "tokens": "?"}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "epoch": 1, "step": 9, "tokens": 1e999, "perplexity": 2.0, "time": 1.0}')
    monkeypatch.setattr(
        LanguageModel, "forward", lambda _, tokens, state: (torch.full((len(tokens), 1, 99), torch.nan), None)
    )
    assert job("report", run).status == 0
    (described,) = report_data(run / "report.html")["runs"]
    assert (described["figures"]["perplexity"], described["figures"]["steps"]) == (None, 8)
    assert described["curves"]["training"]["tokens"][-1] is None
    assert described["text"] == {"reason": "the losses of the validation text are not finite"}


def test_report_of_run_whose_corpus_is_gone_or_changed_leaves_text_out(prose: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    shutil.copy(prose, corpus)
    flags = ["--corpus.max_tokens", 4000, "--corpus.validation_fraction", 0.3, "--train.max_steps", 1]
    run = train(tmp_path, "run", corpus, *flags)
    for change, reason in ((lambda: corpus.write_text("the " * 4000), "is not the text"), (corpus.unlink, "no such")):
        change()
        ended = job("report", run)
        assert (ended.status, ended.err) == (0, "")
        assert reason in report_data(run / "report.html")["runs"][0]["text"]["reason"]


# --- in a browser ---


@pytest.fixture(scope="module")
def page(browser: Browser, storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedPage]:
    """A report of both runs, drawn."""
    file = tmp_path_factory.mktemp("page") / "page.html"
    assert job("report", storage / "first", attacked_run(storage), "--output", file).status == 0
    with open_page(browser, file.as_uri(), color_scheme="light") as watched:
        watched.page.wait_for_selector("html[data-drawn]")
        yield watched


def in_browser(function: Any) -> Any:
    return pytest.mark.browser(pytest.mark.slow(function))


@in_browser
def test_page_draws_curves_and_hover_shows_step_and_perplexity(page: WatchedPage) -> None:
    assert page.page.locator("#plots .plot").count() == 4
    assert page.page.locator("#plot-training .scatterlayer .trace").count() == 3  # two curves, and a restart
    page.page.locator("#plot-training .nsewdrag").hover()
    hover = not_none(page.page.locator("#plot-training .hoverlayer").text_content())
    assert "step" in hover and "perplexity" in hover and "first" in hover
    page.page.evaluate("Plotly.Fx.hover('plot-training', [{curveNumber: 1, pointNumber: 4}])")
    assert "restart before step 5" in not_none(page.page.locator("#plot-training .hoverlayer").text_content())
    page.page.get_by_role("button", name="Tokens", exact=True).click()
    page.page.wait_for_function("document.querySelector('#plot-training .xtitle').textContent === 'tokens'")
    assert page.problems == []


@in_browser
def test_page_zoom_in_one_plot_changes_the_others(page: WatchedPage) -> None:
    page.page.evaluate("Plotly.relayout('plot-training', {'xaxis.range[0]': 100, 'xaxis.range[1]': 300})")
    page.page.wait_for_function("document.getElementById('plot-validation').layout.xaxis.range?.[1] === 300")
    assert page.problems == []


@in_browser
def test_page_shows_foreign_text_as_text(page: WatchedPage) -> None:
    assert page.page.evaluate("[window.attacked, document.querySelectorAll('img').length]") == [None, 0]
    assert page.page.locator("#title").text_content() == f"first, {ATTACK.partition('</')[0]}"
    page.page.get_by_label("Run whose samples are shown").select_option("1")
    assert page.page.locator("#samples mark").first.text_content() == ATTACK
    assert "</script> machine" in not_none(page.page.locator("#losses").text_content())
    assert page.page.evaluate("[window.attacked, document.querySelectorAll('img').length]") == [None, 0]
    assert page.problems == []


@in_browser
def test_page_refuses_scripts_that_are_not_its_own(page: WatchedPage) -> None:
    """What the policy is for: a script that gets into the page does not run."""
    run = "const s = document.createElement('script'); s.textContent = 'window.attacked = 1'; document.body.append(s);"
    assert page.page.evaluate(f"{run} window.attacked ?? null") is None
    page.page.wait_for_function("true")
    assert len(page.problems) == 1 and "Content Security Policy" in page.problems.pop()


@in_browser
def test_page_hover_of_token_shows_its_alternatives(page: WatchedPage) -> None:
    page.page.locator("#losses span").nth(3).hover()
    assert page.page.locator("#tooltip tr").count() == NUM_ALTERNATIVES
    page.page.locator("#losses").press("ArrowRight")
    assert page.page.locator("#losses .chosen").get_attribute("data-token") == "4"
    page.page.locator("#losses").press("Escape")
    assert page.page.locator("#tooltip").is_hidden()


@in_browser
def test_page_theme_follows_button(page: WatchedPage) -> None:
    colors = []
    for theme in ("light", "dark", "auto"):
        page.page.locator("#theme").click()
        assert page.page.locator("#theme").text_content() == f"Theme: {theme}"
        colors.append(page.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colors[0] != colors[1] and colors[0] == colors[2]
    assert page.problems == []


@in_browser
def test_page_on_phone_in_dark_scheme_fits_its_width(browser: Browser, storage: Path) -> None:
    with open_page(browser, (storage / "first" / "report.html").as_uri(), color_scheme="dark", **PHONE) as watched:
        watched.page.wait_for_selector("html[data-drawn]")
        assert watched.page.evaluate("document.documentElement.scrollWidth") == 390
        assert watched.page.locator("#figures dd").count() > 5
        watched.page.locator("#losses span").nth(3).tap()
        assert watched.page.locator("#tooltip").is_visible()
        assert watched.problems == []
