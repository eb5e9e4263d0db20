"""The page in a real browser, where there is one, with streams that need no model."""

import shutil

import pytest

from omniforcing_jax.serving.snapshots import SnapshotStore
from omniforcing_jax.serving.turn_log import TurnLog
from tests.serving.test_web import ColourStream, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
# Chromium looks for much of its own at every start; none of it is there, or needed.
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    "--autoplay-policy=no-user-gesture-required",
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


def wait(page, condition: str) -> None:
    page.wait_for_function(condition)


APPLIED: list[str] = []


class RecordedStream(ColourStream):
    """Notes the turns that were applied."""

    def apply(self, turn):
        super().apply(turn)
        APPLIED.append(turn.kind)


def test_a_person_steers_a_stream(browser, tmp_path):
    """Types, sees it, changes it, goes back, leaves, comes again, stops, and takes it along."""
    store = SnapshotStore(tmp_path, 1 << 20, "")
    with serving(lead=1.0, stream=RecordedStream, store=store) as port:
        # Playwright's waiting evaluates strings, which the page's own policy forbids
        page = browser.new_context(bypass_csp=True).new_page()
        page.set_default_timeout(180_000)
        errors, asked = [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://localhost:{port}")
        page.press("#prompt", "Enter")
        assert "Type a prompt first" in page.inner_text("#state")
        page.fill("#prompt", "red")
        page.press("#prompt", "Enter")
        wait(page, "document.querySelector('#first').textContent !== '–'")
        wait(page, "document.querySelector('#video').currentTime > 0.5")
        # a browser that is behind catches up
        wait(page, "document.querySelector('#video').currentTime > 3.5")
        page.evaluate("document.querySelector('#video').currentTime = 0.1")
        wait(page, "document.querySelector('#video').playbackRate > 1")
        page.fill("#prompt", "blue")
        page.press("#prompt", "Enter")
        wait(page, "document.querySelector('#switch').textContent !== '–'")
        page.fill("#prompt", "purple")
        page.press("#prompt", "Enter")
        wait(page, "document.querySelector('#state').textContent.includes('no colour')")
        page.click("#back")
        assert "Back to block" in page.inner_text("#state")
        page.click("#reseed")
        page.click("#pause")
        assert page.inner_text("#pause") == "Resume"
        page.click("#pause")
        for _ in range(3600):  # a page that goes may take along what it has not sent
            if APPLIED == ["prompt", "rewind", "seed"]:
                break
            page.wait_for_timeout(50)
        page.reload()
        page.click("#again")
        wait(page, "document.querySelector('#video').currentTime > 0.5")
        page.keyboard.press("Escape")
        wait(page, "!document.querySelector('#download').hidden")
        with page.expect_download() as download:
            page.click("#download")
        assert download.value.path().stat().st_size > 1000
        with page.expect_download() as download:
            page.click("#turns")
        kinds = [turn.kind for turn in TurnLog.from_json(download.value.path().read_text()).turns]
        assert kinds == ["prompt", "rewind", "seed"]
        prompts = [button.inner_text() for button in page.query_selector_all("#history button")]
        assert prompts[:3] == ["purple", "blue", "red"]
        # neither wider than a phone nor dependent on anybody else
        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert errors == []
        own = (f"http://localhost:{port}/", f"blob:http://localhost:{port}/", "data:")
        assert [url for url in asked if not url.startswith(own)] == []
