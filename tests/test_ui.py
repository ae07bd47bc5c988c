"""The page of `latent-codec ui` in a real browser: each tab does its job, and no request leaves this machine."""

import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.processes import Process
from PIL import Image

from latent_codec.images.sample_photograph import sample_photograph

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("needs the browser chromium, which is not installed", allow_module_level=True)
if find_spec("gradio") is None:
    pytest.skip("needs gradio, of the extra [ui]", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra [ui-test]")

SIDE = 128
"""Of the image that the page opens with, in pixels."""
SCREENSHOTS = os.environ.get("UI_SCREENSHOTS")
"""A folder for screenshots of every tab, for people to look at."""

GUARDED = """
import sys

def guard(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = args[1] if event == "socket.connect" else args
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", b"127.0.0.1", "localhost", "::1", None):
            print("LEFT", address, file=sys.stderr, flush=True)
            raise OSError(f"no connection is allowed to {address}")

sys.addaudithook(guard)
from latent_codec.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line, with a note of every address other than this machine's that it connects to or looks up."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The verb in a process of its own, with a temporary folder of its own, and the URL that it prints."""
    kept, image = tmp_path_factory.mktemp("kept"), tmp_path_factory.mktemp("images") / "seen.png"
    middle = Image.open(sample_photograph()).crop((180, 60, 180 + SIDE, 60 + SIDE))
    middle.save(image)
    process = Process(GUARDED, "ui", image, "--json", "--port", 7900, TMPDIR=str(kept))
    while not (said := process.read("out")).endswith("\n"):
        assert process.poll() is None, process.read("err")
        time.sleep(0.1)
    yield process, json.loads(said)["url"]
    os.kill(process.pid, signal.SIGTERM)
    done = process.result()
    assert done.returncode == 0, done.stderr
    assert "LEFT" not in done.stderr
    assert not [path for path in kept.iterdir() if path.name.startswith("latent-codec")]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser, served):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(90_000)
    page.left, page.said = [], []

    def only_here(route):
        if route.request.url.startswith(served[1]) or route.request.url.startswith(("data:", "blob:")):
            return route.continue_()
        page.left.append(route.request.url)
        return route.abort()

    page.route("**/*", only_here)
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("console", lambda each: page.said.append(each.text) if each.type == "error" else None)
    page.goto(served[1])
    return page


def open_tab(page, *names):
    for name in names:
        page.get_by_role("tab", name=name, exact=True).click()


def size_of(page, selector):
    """The size in pixels of an image, once it is there."""
    page.wait_for_function(
        "selector => { const all = document.querySelectorAll(selector); const last = all[all.length - 1];"
        " return last && last.complete && last.naturalWidth > 0 }",
        arg=selector,
    )
    return page.evaluate(
        "selector => { const all = document.querySelectorAll(selector); const last = all[all.length - 1];"
        " return [last.naturalWidth, last.naturalHeight] }",
        selector,
    )


def keep(page, name):
    if SCREENSHOTS:
        page.wait_for_timeout(300)
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


def test_round_trip_by_one_click(page):
    page.locator("#round-trip-go").click()
    assert size_of(page, "#round-trip-slider img") == [2 * SIDE, 2 * SIDE]
    words = page.locator("#round-trip-figures").inner_text()
    assert "PSNR" in words and "dB" in words and "LPIPS" in words
    keep(page, "round-trip")


def test_several_clicks_at_once_do_no_harm(page):
    for _ in range(4):
        page.locator("#round-trip-go").click(no_wait_after=True)
    page.get_by_label("Codec").first.click()
    page.get_by_role("option", name="garments").click()
    page.locator("#round-trip-figures").get_by_text("28x28 px", exact=True).wait_for()
    assert size_of(page, "#round-trip-slider img") == [252, 252]


def test_compare_and_its_crop_follows_the_pointer(page):
    open_tab(page, "Compare")
    page.locator("#compare-go").click()
    page.wait_for_selector("#compare-grid figure:nth-of-type(5)")
    words = page.locator("#compare-grid").inner_text()
    assert all(name in words for name in ("original", "default", "jpeg", "webp", "avif"))
    image = page.locator("#compare-grid img").first
    crop = page.locator("#compare-grid .lc-crop").last
    places = []
    for x, y in ((10, 20), (100, 120)):
        image.hover(position={"x": x, "y": y})
        places.append(crop.evaluate("each => getComputedStyle(each).backgroundPosition"))
    assert places[0] != places[1]
    keep(page, "compare")


def test_compress_download_and_open_again(page, tmp_path):
    open_tab(page, "Compress")
    page.locator("#compress-go").click()
    page.locator("#compress-figures td").first.wait_for()
    with page.expect_download() as found:
        page.locator("#compress-download").click()
    found.value.save_as(tmp_path / "again.lcf")
    size = (tmp_path / "again.lcf").stat().st_size
    bound = 0.2 * SIDE * SIDE / 8
    assert 0.7 * bound < size <= bound

    page.locator("#compress-arrive").click()
    page.get_by_text("stage 4 of 4").wait_for()
    keep(page, "compress")
    page.locator("#compress-open input[type=file]").set_input_files(tmp_path / "again.lcf")
    page.locator("#compress-figures").get_by_text("codec").wait_for()
    assert f"{size:,} bytes" in page.locator("#compress-figures").inner_text()


def test_latents_are_shown_and_turned(page):
    open_tab(page, "Latents")
    page.locator("#channels-go").click()
    page.get_by_text("4 channels of 16x16").wait_for()
    keep(page, "latents-channels")

    open_tab(page, "Morph")
    page.locator("#morph-go").click()
    assert size_of(page, "#morph img")[0] >= 150
    keep(page, "latents-morph")

    open_tab(page, "Turn")
    page.locator("#turn-go").click()
    page.get_by_label("dimension").first.wait_for()
    image = "#turn-image img"
    size_of(page, image)
    before = page.locator(image).get_attribute("src")
    page.locator("#turn-0 input[type=number]").fill("3")
    page.locator("#turn-0 input[type=number]").press("Tab")
    page.wait_for_function(
        "([selector, src]) => document.querySelector(selector)?.src != src",
        arg=[image, before],
    )
    keep(page, "latents-turn")

    open_tab(page, "Complete")
    page.locator("#complete-go").click()
    page.wait_for_selector("#completed img >> nth=3")
    keep(page, "latents-complete")


def test_watch_a_pipeline_draw(page):
    open_tab(page, "Watch")
    page.locator("#watch-go").click()
    page.get_by_text("step ").first.wait_for()
    page.get_by_text("done: ").wait_for()
    assert min(size_of(page, "#watch-image img")) >= 256
    keep(page, "watch")


def test_what_goes_wrong_is_one_line(page, tmp_path):
    open_tab(page, "Round trip")
    (tmp_path / "no.png").write_bytes(b"<b>nothing</b>")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "no.png")
    page.get_by_text("no.png").first.wait_for()


def test_nothing_has_left_this_machine(page, served):
    assert page.left == [] and "LEFT" not in served[0].read("err")
    assert page.said == []


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../etc/passwd", str(Path(__file__))])
def test_no_other_file_is_served(served, path):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{served[1]}gradio_api/file={path}")
    assert error.value.code in (403, 404)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "http://203.0.113.1/cat.png", "https://huggingface.co/cat.png"]
)
def test_nothing_is_opened_that_was_not_dropped(served, path):
    """As a program would ask that fills in a form of its own."""
    url = served[1] + "gradio_api/queue/"
    config = json.load(urllib.request.urlopen(served[1] + "config"))
    sending = next(
        each for each in config["dependencies"] if len(each["inputs"]) == 2 and len(each["outputs"]) == 3
    )
    dropped = {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "cat.png"}
    body = {"data": [dropped, "default"], "fn_index": sending["id"], "session_hash": "test"}
    request = urllib.request.Request(
        url + "join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request)
    with urllib.request.urlopen(url + "data?session_hash=test", timeout=30) as stream:
        for line in stream:
            said = json.loads(line.removeprefix(b"data: ")) if line.strip() else {}
            if said.get("msg") == "process_completed":
                break
    assert said["success"] is False and "root:" not in json.dumps(said)
    assert "LEFT" not in served[0].read("err")
