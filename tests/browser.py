"""Headless Chromium for tests of pages, which have the marker ``browser`` and the fixture of that name."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


@dataclass
class WatchedPage:
    """A page, and what went wrong in it: console errors, exceptions, failed requests."""

    page: Page
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda line: self.problems.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("requestfailed", lambda request: self.problems.append(f"{request.url}: {request.failure}"))


@contextmanager
def open_page(browser: Browser, url: str, **context: Any) -> Iterator[WatchedPage]:
    """Opens a page in a context of its own, such as ``color_scheme="dark"`` or ``**PHONE``, until it has loaded."""
    with browser.new_context(**context) as own_context:
        watched = WatchedPage(own_context.new_page())
        watched.page.goto(url)
        yield watched


@contextmanager
def launch_chromium() -> Iterator[Browser]:
    """Starts headless Chromium; skips the test where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if not path:
        pytest.skip(f"needs one of {', '.join(names)} (apt-get install chromium)")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=flags) as chromium:
        yield chromium
