"""Size of a report of long runs, and the time until a browser has drawn it; pictures of reports for the documentation.

python -m benchmarks.report [--runs N] [--rows N]
python -m benchmarks.report --pictures FOLDER REPORT.html
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.measure import machine
from job.config.schema import Config
from job.config.toml import config_to_toml
from job.console import Console
from job.report.write import write_report

ROUNDS = 5
NUM_COLORS = 64  # of a picture
WINDOW = {"viewport": {"width": 1200, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
PICTURES: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", **WINDOW},
    "dark": {"color_scheme": "dark", **WINDOW},
    "phone": {"color_scheme": "light", **PHONE},
}


def write_run(folder: Path, number: int, num_rows: int) -> None:
    """Writes a run whose loss falls with noise, and is validated every hundred rows."""
    random.seed(number)
    folder.mkdir()
    (folder / "config.toml").write_text(config_to_toml(Config()))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, num_rows + 1):
            nats = 1.2 + 3 / math.sqrt(1 + step / 100) + random.gauss(0, 0.05) + number / 50
            row = {
                "split": "train", "epoch": 1 + step // 1000, "step": step, "tokens": 1280 * step, "nats": nats,
                "perplexity": math.exp(nats), "learning_rate": 0.002 * (1 - step / num_rows),
                "tokens_per_second": random.gauss(250_000, 20_000), "workers": 2, "time": 1.7e9 + step / 50,
            }  # fmt: skip
            file.write(json.dumps(row) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({**row, "split": "validation"}) + "\n")


def launch(playwright: Any) -> Browser:
    """Headless Chromium."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])


def draw(browser: Browser, report: Path, options: dict[str, Any]) -> Page:
    """Opens a report and waits until its curves are drawn."""
    page = browser.new_context(**options).new_page()
    page.goto(report.absolute().as_uri())
    page.wait_for_selector("html[data-drawn]")
    return page


def measure(num_runs: int, num_rows: int) -> dict[str, Any]:
    """Returns the time to write a report, its size, and the time from opening it until all is drawn.

    The last is the median, least and largest; the CPU time is that of the page's process.
    """
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        runs = [Path(folder, f"run-{number}") for number in range(num_runs)]
        for number, run in enumerate(runs):
            write_run(run, number, num_rows)
        report, started_at = Path(folder, "report.html"), time.perf_counter()
        write_report([str(run) for run in runs], str(report), Console())
        written_s = time.perf_counter() - started_at
        times, cpu_times = [], []
        for _ in range(ROUNDS):
            with launch(playwright) as browser:
                page = draw(browser, report, WINDOW)
                times.append(float(page.evaluate("document.documentElement.dataset.drawn")) / 1000)
                session = page.context.new_cdp_session(page)
                session.send("Performance.enable")
                metrics = session.send("Performance.getMetrics")["metrics"]
                cpu_times.append(next(entry["value"] for entry in metrics if entry["name"] == "ProcessTime"))
        return {
            "runs": num_runs, "rows": num_rows, "written_s": round(written_s, 1),
            "megabytes": round(report.stat().st_size / 1e6, 2),
            "drawn_s": [round(value, 2) for value in (statistics.median(times), min(times), max(times))],
            "cpu_s": round(statistics.median(cpu_times), 2),
        }  # fmt: skip


def take_pictures(report: Path, folder: Path) -> None:
    """Writes ``report-light.png``, ``…-dark.png``, ``…-phone.png``, and ``…-text.png``, the text with its losses."""
    with sync_playwright() as playwright, launch(playwright) as browser:
        for name, options in PICTURES.items():
            page = draw(browser, report, options)
            page.locator("#plot-training .nsewdrag").hover(position={"x": 180, "y": 120}, force=True)
            page.screenshot(path=folder / f"report-{name}.png")
        page = draw(browser, report, PICTURES["light"])
        page.locator("#losses span").nth(130).hover()
        page.locator("#text").screenshot(path=folder / "report-text.png")
    for picture in folder.glob("report-*.png"):
        Image.open(picture).quantize(NUM_COLORS).save(picture, optimize=True)


def main() -> None:
    """Measures, or takes pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER")
    parser.add_argument("report", type=Path, nargs="?")
    arguments = parser.parse_args()
    if arguments.pictures:
        take_pictures(arguments.report, arguments.pictures)
    else:
        print(machine())
        print(json.dumps(measure(arguments.runs, arguments.rows)))


if __name__ == "__main__":
    main()
