"""How the page of a live server plays, in Chromium, hour by hour.

    make serve                                               # or any launch.serve, in one terminal
    python -m benchmarks.page --seconds 3600 --switches 60   # in another

Types a prompt into the page and others as it plays. Prints the time from Enter to the first
picture, how often the picture stood still, the least that the browser had in store, the longest
time from a new prompt to its picture, blocks that were late, what the server compiled, and its
memory after a tenth of the time and at the end. Needs Playwright (`pip install -e '.[test]'`) and
Chromium.
"""

import argparse
import json
import pathlib
import shutil
import sys
import time
from typing import Any

from benchmarks.serve import PROMPTS, figures
from omniforcing_jax import programs
from omniforcing_jax.io.paths import new_file
from omniforcing_jax.ranges import Range

POLL = 1.0  # seconds
# Beside the page's own figures: what is in store, every 50 ms while it plays.
WATCH = """() => {
  const video = document.getElementById("video");
  window.watched = { stood: 0, least: Infinity };
  video.addEventListener("waiting", () => { if (video.currentTime > 1) watched.stood += 1; });
  setInterval(() => {
    const ranges = video.buffered;
    if (ranges.length && video.currentTime > 1 && !video.paused) {
      const store = ranges.end(ranges.length - 1) - video.currentTime;
      watched.least = Math.min(watched.least, store);
    }
  }, 50);
}"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of this program."""
    parser = programs.Parser("benchmarks.page", __doc__)
    add = parser.add_argument
    add("--port", type=programs.number(int, Range(1, 65535)), default=8000, help="(default 8000)")
    seconds = programs.number(float, Range(10, 86_400))
    add("--seconds", type=seconds, default=60.0, help="of the stream (default 60)")
    switches = programs.number(int, Range(0, 10_000))
    add("--switches", type=switches, default=5, help="changes of the prompt (default 5)")
    add("--chromium", default=shutil.which("chromium"), help="program (default: the one in PATH)")
    add("--json", type=pathlib.Path, help="write the figures there, too")
    return parser.parse_args(argv)


def measure(page: Any, args: argparse.Namespace) -> dict[str, float]:
    """The figures of a page that was opened."""

    def ask(prompt: str) -> None:
        page.fill("#prompt", prompt)
        page.press("#prompt", "Enter")

    def shown(name: str) -> float | None:
        text = page.inner_text(f"#{name}")
        return None if text == "–" else float(text.split()[0])

    page.evaluate(WATCH)
    before, begin = figures(args.port), time.monotonic()
    ask(PROMPTS[0])
    page.wait_for_function("document.getElementById('first').textContent !== '–'", timeout=60_000)
    switched, slowest, early = 0, 0.0, None
    while (now := time.monotonic() - begin) < args.seconds:
        if switched < args.switches and now > (switched + 1) * args.seconds / (args.switches + 1):
            switched += 1
            ask(PROMPTS[switched % len(PROMPTS)])
        if early is None and now > args.seconds / 10:
            early = figures(args.port)
        slowest = max(slowest, shown("switch") or 0.0)
        time.sleep(POLL)
    found, after = page.evaluate("watched"), figures(args.port)
    memory = "process_resident_memory_bytes"
    return {
        "Enter to the first picture, s": shown("first"),
        "picture stood still, times": found["stood"],
        "least in store, s": found["least"],
        "new prompt to its picture, s (longest)": slowest,
        "played, s": shown("position"),
        "blocks": after["blocks_total"] - before["blocks_total"],
        "late blocks": after["late_blocks_total"] - before["late_blocks_total"],
        "compiled after the start": after["compilations_total"] - before["compilations_total"],
        "memory, MB (after a tenth)": early[memory] / 1e6,
        "memory, MB (end)": after[memory] / 1e6,
    }


@programs.entry
def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    if not args.chromium or not pathlib.Path(args.chromium).exists():
        raise ValueError("there is no Chromium; name one by --chromium")
    figures(args.port)  # is it there
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=args.chromium, args=options)
        # Playwright's waiting evaluates strings, which the page's own policy forbids
        page = browser.new_context(bypass_csp=True).new_page()
        page.goto(f"http://localhost:{args.port}")
        result = measure(page, args)
        browser.close()
    for name, value in result.items():
        print(f"{name:<40}{value:10.3f}")
    if args.json:
        with new_file(args.json) as temporary:
            temporary.write_text(json.dumps({"seconds": args.seconds, "figures": result}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
