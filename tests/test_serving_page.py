"""The page of ``serve`` in a browser: it streams, carries and resets the state, and shows foreign text as text."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import requests
from browser import PHONE, WatchedPage, open_page
from conftest import job
from playwright.sync_api import Browser, Page, expect
from serving import SCRIPT, TOKEN, serving
from test_evaluate import FLAGS

from job.config.schema import Config
from job.config.toml import override_config
from job.inference.generate import generate_texts
from job.run.run_dir import open_checkpoint
from job.serving.conversations import ServedModel
from job.serving.server import load_models
from job.storage import Folder
from job.training.checkpoint import LoadedCheckpoint

expect.set_options(timeout=20_000)
pytestmark = [pytest.mark.browser, pytest.mark.slow]
OPTIONS = {"temperature": "1", "length": "40", "seed": "7"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedCheckpoint]:
    """Two models of a text with a script, the second in a run whose name is a script."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "text").write_text(f"It was the best of {SCRIPT} times.\n" * 60)
    flags = {**FLAGS, "corpus.source": folder / "text", "run.storage": folder, "train.epochs": 2}
    loaded = []
    for cell in ("lstm", "gru"):
        ended = job(
            "train",
            *(str(w) for f, v in {**flags, "run.name": cell, "model.cell": cell}.items() for w in (f"--{f}", v)),
        )
        assert ended.status == 0, ended.err
        loaded.append(open_checkpoint(Folder(str(folder / cell))))
    return loaded


@pytest.fixture(scope="module")
def models(checkpoints: list[LoadedCheckpoint]) -> list[ServedModel]:
    first, second = load_models(checkpoints, Config())
    return [first, replace(second, name=SCRIPT)]


@pytest.fixture(scope="module")
def url(models: list[ServedModel]) -> Iterator[str]:
    with serving(models) as (_, address):
        yield address


@pytest.fixture
def watched(browser: Browser, url: str) -> Iterator[WatchedPage]:
    """The page, without any problem at the end."""
    with open_page(browser, url) as page:
        set_options(page.page, **OPTIONS)
        yield page
        assert problems(page) == []


def problems(watched: WatchedPage) -> list[str]:
    """What went wrong; a request that the page aborts because the text has changed does not count."""
    return [problem for problem in watched.problems if "ERR_ABORTED" not in problem]


def set_options(page: Page, **options: str) -> None:
    expect(page.locator(".card")).not_to_have_count(0)
    for name, value in options.items():
        page.locator(f"#{name}").fill(value)


def texts(page: Page, part: str = "continuation") -> list[str]:
    return [str(text) for text in page.locator(f".{part}").all_text_contents()]


def wait_for_end(page: Page, tokens: int = 40) -> None:
    for status in page.locator(".status").all():
        expect(status).to_have_text(f"{tokens} tokens")


def wait_for_texts(page: Page, expected: list[str]) -> None:
    deadline = time.monotonic() + 20
    while texts(page) != expected:
        assert time.monotonic() < deadline, (texts(page), expected)
        page.wait_for_timeout(20)


def expected(checkpoints: list[LoadedCheckpoint], prefix: str) -> list[str]:
    """The continuations that ``generate`` prints."""
    fields = {"prefix": prefix, "length": 40, "temperature": 1.0, "seed": 7}
    values: dict[str, Any] = {f"generate.{name}": value for name, value in fields.items()}
    return [generate_texts([one], override_config(one.config, values)).continuations[0] for one in checkpoints]


def test_page_continues_the_text_by_each_model(watched: WatchedPage, checkpoints: list[LoadedCheckpoint]) -> None:
    page = watched.page
    page.locator("#prefix").fill("It was")
    wait_for_texts(page, expected(checkpoints, "It was"))
    page.locator("#prefix").press_sequentially(" the")
    expect(page.locator(".typed").first).to_have_text("It was the")
    wait_for_texts(page, expected(checkpoints, "It was the"))


def test_page_carries_the_state_and_resets_it(watched: WatchedPage, checkpoints: list[LoadedCheckpoint]) -> None:
    page = watched.page
    page.locator("#prefix").fill("It was")
    wait_for_end(page)
    first = texts(page)
    page.locator("#prefix").press("Control+Enter")
    second = [expected([one], f"It was{text}")[0] for one, text in zip(checkpoints, first, strict=True)]
    wait_for_texts(page, second)
    expect(page.locator("#prefix")).to_have_value("")
    assert texts(page, "kept") == [f"It was{text}" for text in first]
    page.locator("#prefix").fill(" best")
    wait_for_texts(
        page, [expected([one], f"It was{text} best")[0] for one, text in zip(checkpoints, first, strict=True)]
    )
    page.locator("#prefix").fill("It was")
    page.locator("#reset").click()
    expect(page.locator(".kept").first).to_be_empty()
    expect(page.locator(".typed").first).to_have_text("It was")
    wait_for_texts(page, expected(checkpoints, "It was"))


def test_page_shows_probabilities_and_continues_with_an_alternative(
    watched: WatchedPage, checkpoints: list[LoadedCheckpoint]
) -> None:
    """By the keyboard alone."""
    page = watched.page
    page.locator("#prefix").fill("It was")
    wait_for_end(page)
    card = page.locator(".card").first
    card.locator(".token").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(card.locator("h3")).to_have_text("Instead of token 3")
    bars = card.locator(".bars button")
    expect(bars).to_have_count(8)
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    alternative = str(bars.nth(1).locator("span").first.text_content()).replace("␣", " ")
    shown = texts(page)[0][:2] + alternative
    page.keyboard.press("Enter")
    wait_for_texts(page, [shown + expected(checkpoints, f"It was{shown}")[0], expected(checkpoints, "It was")[1]])
    expect(card.locator(".status")).to_have_text("43 tokens")


def test_page_samples_by_its_sliders(watched: WatchedPage) -> None:
    page = watched.page
    set_options(page, temperature="0")
    for name in ("top_k", "top_p", "seed"):
        expect(page.locator(f"#{name}")).to_be_disabled()
    set_options(page, temperature="1.5", top_k="3")
    page.locator("#prefix").fill("It was")
    wait_for_end(page)
    expect(page.locator(".card").first.locator(".bars button")).to_have_count(3)
    before = texts(page)
    page.locator("#resample").click()
    expect(page.locator(".continuation").first).not_to_have_text(before[0])


def test_page_shows_errors_and_foreign_text_as_text(browser: Browser, url: str) -> None:
    with open_page(browser, url) as watched:
        page = watched.page
        set_options(page, temperature="1")
        expect(page.locator("h2").nth(1)).to_have_text(SCRIPT)
        page.locator("#prefix").fill(SCRIPT)
        wait_for_end(page, 200)
        expect(page.locator(".typed").first).to_have_text(SCRIPT)
        assert page.title() == "lstm – lanes"
        assert page.locator("main script").count() == 0
        page.locator("#prefix").fill("☃")
        expect(page.locator(".status.error").first).to_contain_text("not in the vocabulary: '☃'")
        assert all("422" in problem for problem in problems(watched))


def test_page_whose_conversations_are_gone_starts_again(browser: Browser, models: list[ServedModel]) -> None:
    with serving(models) as (server, url), open_page(browser, url) as watched:
        page = watched.page
        set_options(page, **OPTIONS)
        page.locator("#prefix").fill("It was")
        wait_for_end(page)
        for conversation in list(server.service.conversations._entries.values()):
            server.service.conversations.delete(conversation[0])
        page.locator("#prefix").fill("It was the")
        for panel in range(2):
            expect(page.locator(".typed").nth(panel)).to_have_text("It was the")
            expect(page.locator(".status").nth(panel)).to_have_text("40 tokens")
        assert len(server.service.conversations) == 2


def test_page_stops_a_stream_and_frees_its_place(browser: Browser, models: list[ServedModel]) -> None:
    with serving(models) as (server, url), open_page(browser, url) as watched:
        page = watched.page
        set_options(page, temperature="1", length="1000")
        page.evaluate("document.getElementById('length').max = 10000")
        set_options(page, length="10000")
        page.locator("#prefix").fill("It was")
        expect(page.locator(".token").nth(5)).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator(".status").first).to_contain_text("stopped")
        while server.service.engine.num_streams:
            page.wait_for_timeout(10)


def test_page_with_token_asks_for_it(browser: Browser, models: list[ServedModel]) -> None:
    with serving(models, token=TOKEN) as (_, url), open_page(browser, url) as watched:
        page = watched.page
        page.locator("#token").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#login-error")).to_contain_text("token is missing or wrong")
        page.locator("#token").fill(TOKEN)
        page.keyboard.press("Enter")
        set_options(page, **OPTIONS)
        page.locator("#prefix").fill("It was")
        wait_for_end(page)
        assert TOKEN not in requests.get(url, timeout=60).text
        assert TOKEN not in page.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_on_phone_fits_its_width(browser: Browser, url: str, scheme: Any) -> None:
    with open_page(browser, url, color_scheme=scheme, **PHONE) as watched:
        page = watched.page
        page.locator("#prefix").fill("It was")
        wait_for_end(page, 200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(246, 247, 248)", "dark": "rgb(20, 23, 26)"}[scheme]
        assert problems(watched) == []
