"""The first screen of a report as a picture: `python benchmarks/report_picture.py reports/demo/report.html docs/report.png`.

Needs Chromium (CHROMIUM names it where it is not on PATH).
"""

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1180, 1000


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Take a picture of a report's first screen.")
    parser.add_argument("report", type=Path, help="report.html")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    options = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(options.report.resolve().as_uri())
        page.screenshot(path=options.picture)
        browser.close()


if __name__ == "__main__":
    main()
