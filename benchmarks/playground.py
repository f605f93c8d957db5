"""A picture of the service's playground in headless Chromium.

pip install playwright  # and a Chromium of the system
python -m benchmarks.playground --checkpoint runs/sst2 --text "a text"
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from benchmarks import command_line


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pabee_jax.commands.main", "serve"]
    server = subprocess.Popen([*command, f"--checkpoint={options.checkpoint}", f"--port={port}"])
    url = f"http://127.0.0.1:{port}"
    try:
        while not _is_ready(url):
            if server.poll() is not None:
                raise SystemExit("the service has ended")
            time.sleep(0.5)
        take_picture(url, options)
    finally:
        server.terminate()
        server.wait()


def _is_ready(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health").status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def make_parser() -> argparse.ArgumentParser:
    parser = command_line.base_parser(__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--width", type=command_line.positive_integer, default=760)
    return parser


if __name__ == "__main__":
    command_line.run(main, make_parser())
