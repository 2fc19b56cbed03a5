"""The browser of the tests reports what goes wrong in a page."""

from pathlib import Path

import pytest
from browser import PHONE, open_page
from playwright.sync_api import Browser

pytestmark = [pytest.mark.browser, pytest.mark.slow]


def test_page_with_errors_has_problems(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<img src='missing.png'><script>console.error('wrong'); throw new Error('thrown')</script>")
    with open_page(browser, page.as_uri()) as watched:
        assert {"wrong", "thrown"} <= set(watched.problems)
        assert any("missing.png" in problem for problem in watched.problems)


def test_page_without_errors_on_phone_has_no_problems(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><meta name=viewport content='width=device-width'><title>A</title>")
    with open_page(browser, page.as_uri(), color_scheme="dark", **PHONE) as watched:
        assert watched.page.evaluate("[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches]") == [390, True]
        assert watched.problems == []
