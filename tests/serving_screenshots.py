"""Takes the pictures of docs/serving.md: the page of ``serve`` with the models of some runs.

PYTHONPATH=. python tests/serving_screenshots.py RUN …
"""

import io
import sys
from collections.abc import Sequence
from typing import Any

from browser import PHONE, launch_chromium, open_page
from conftest import ROOT
from PIL import Image
from playwright.sync_api import Page, expect
from serving import serving

from job.config.schema import Config
from job.run.run_dir import open_checkpoint
from job.serving.server import load_models
from job.storage import Folder

PICTURES: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1100, "height": 820}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1100, "height": 820}},
    "phone": {"color_scheme": "dark", **PHONE, "device_scale_factor": 1},
}
COLORS = 64  # of a picture, so that its file is small


def write_pictures(runs: Sequence[str]) -> None:
    models = load_models([open_checkpoint(Folder.resolve(run)) for run in runs], Config())
    with serving(models) as (_, url), launch_chromium() as browser:
        for name, context in PICTURES.items():
            with open_page(browser, url, **context) as watched:
                show_continuation(watched.page)
                picture = Image.open(io.BytesIO(watched.page.screenshot())).convert("RGB").quantize(COLORS)
                picture.save(ROOT / "docs" / "assets" / f"serving-{name}.png", optimize=True)


def show_continuation(page: Page) -> None:
    expect(page.locator(".card")).not_to_have_count(0)
    page.locator("#prefix").fill("The Time Traveller ")
    for status in page.locator(".status").all():
        expect(status).to_have_text("200 tokens")
    page.locator(".token").nth(8).click()


if __name__ == "__main__":
    write_pictures(sys.argv[1:])
