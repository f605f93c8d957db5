"""A picture of the service's playground in headless Chromium.

    python -m benchmarks.playground --checkpoint runs/sst2 --text "a text"

Needs the extra `dev` and a Chromium of the system.
"""

import argparse
import shutil

from benchmarks import command_line
from benchmarks.service_process import Server


def take_picture(url: str, options) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": options.width, "height": 900})
        page.goto(url)
        page.fill("#text", options.text)
        page.click("#submit")
        page.wait_for_selector("#answer:not([hidden])")
        path = options.output / "playground.png"
        page.screenshot(path=path, full_page=True)
        browser.close()
    print(f"written: {path}")


def main(options) -> None:
    server = Server(options.checkpoint).wait_until_ready()
    try:
        take_picture(server.url, options)
    finally:
        server.stop()


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--width", type=command_line.positive_integer, default=760)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
