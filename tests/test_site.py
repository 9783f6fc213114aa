"""The pages of the site fit on wide and on narrow screens."""

import json
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

import pytest

ROOT = Path(__file__).parents[1]
WIDTHS = (1400, 420)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage", "window-size=1600,1000"),
    *("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"),
    "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
)

# Opens each page at each width, and sends what of it can't be seen: what is wider than the window, or than its column
# and neither scrolls nor is in something that does; and code that has to be scrolled.
LOOK = """<!doctype html><body><script>
const scrolls = element => element && (/auto|scroll/.test(getComputedStyle(element).overflowX)
    || scrolls(element.parentElement));
async function look(path, width) {
    const frame = document.createElement("iframe");
    frame.width = width;
    frame.height = 900;
    frame.src = path;
    document.body.append(frame);
    await new Promise(done => frame.onload = done);
    const page = frame.contentDocument, column = page.querySelector(".md-content");
    const right = column.getBoundingClientRect().right;
    const cut = [...column.querySelectorAll("*")].filter(element =>
        element.getBoundingClientRect().right > right && element.getClientRects().length && !scrolls(element));
    const code = [...column.querySelectorAll(".highlight:not(.language-text) > pre > code")];
    cut.push(...code.filter(element => element.scrollWidth > element.clientWidth));
    const found = cut.slice(0, 3).map(element => element.textContent.trim().slice(0, 100));
    if (page.documentElement.scrollWidth > width)
        found.push(`the page is ${page.documentElement.scrollWidth} wide`);
    frame.remove();
    return found.map(what => `${path} at ${width}: ${what}`);
}
(async () => {
    for (const width of WIDTHS) for (const path of PAGES) {
        const found = await look(path, width).catch(error => [`${path}: ${error}`]);
        await fetch("/", {method: "POST", body: JSON.stringify(found)});
    }
})();
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_nothing_is_cut_or_wider_than_the_screen(site, tmp_path):
    pages = sorted(f"/{page.relative_to(site)}" for page in site.rglob("index.html"))
    text = LOOK.replace("WIDTHS", json.dumps(WIDTHS)).replace("PAGES", json.dumps(pages))
    folder = shutil.copytree(site, tmp_path / "site")
    (folder / "look.html").write_text(text, encoding="utf-8")
    assert len(pages) > 20
    assert list(sent(folder, tmp_path / "profile", len(WIDTHS) * len(pages))) == []


def sent(site, profile, count):
    """What the page that looks at the others sends, in `count` requests."""
    received = Queue()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(site))

        def do_POST(self):
            received.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [CHROMIUM, *(f"--{flag}" for flag in (*FLAGS, f"user-data-dir={profile}"))]
        address = f"http://localhost:{server.server_port}/look.html"
        with subprocess.Popen([*command, address], stderr=subprocess.DEVNULL) as browser:
            try:
                for _ in range(count):
                    yield from received.get(timeout=60)
            finally:
                browser.terminate()
                server.shutdown()
