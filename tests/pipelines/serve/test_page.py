"""The page in a real browser, in front of the real server.

What it shows of queues, faults and keys is tried on a server that has them on order.
"""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
import pytest
from PIL import Image

from reelway.kernels.sprites.captions import parse
from reelway.kernels.sprites.render import render

from . import serving
from .stand_in import StandIn

sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")

ARGUMENTS: Final = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-quic", "--autoplay-policy=no-user-gesture-required",
)  # fmt: skip
PATIENCE: Final = 60_000  # milliseconds; the machine may be busy
START: Final = 300.0  # seconds for a worker to be ready
SIZE: Final = (64, 64)  # the student's own
SLOWLY: Final = "4"  # frames per second that a busy machine makes too
RED, STAR, CYAN = (
    "a large red circle circling fast on black",
    "a big yellow star bouncing slowly on navy",
    "a large cyan square circling fast on white",
)

# The picture that is seen, as numbers: mean colour, and a checksum that another picture does not have.
SEEN: Final = """(card) => {
  const shown = card.querySelector(".screen > :is(video, canvas):not([hidden])");
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 32;
  const pen = canvas.getContext("2d");
  if (shown) pen.drawImage(shown, 0, 0, 32, 32);
  const pixels = pen.getImageData(0, 0, 32, 32).data;
  const sums = [0, 0, 0];
  let check = 0;
  for (let at = 0; at < pixels.length; at += 4)
    for (let part = 0; part < 3; part++) {
      sums[part] += pixels[at + part] / 1024;
      check = (check * 31 + pixels[at + part]) % 1000003;
    }
  return [...sums, check];
}"""


# Whoever only looks now and then may miss a state that does not last.
NOTE_STATES: Final = """(card) => {
  window.states = [];
  const note = () => window.states.push(card.dataset.state);
  new MutationObserver(note).observe(card, { attributes: true, attributeFilter: ["data-state"] });
}"""


def _browser_path() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


CHROMIUM = _browser_path()
pytestmark = [
    pytest.mark.slow,  # they need a browser, which `make test` does not install
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome in PATH"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api.expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield running
        running.close()


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn(flush=12) as running:
        yield running


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end no script may have failed."""
    faults: list[str] = []
    contexts = []

    def open_page(url: str, width: int = 1280, height: int = 900, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def card_of(page: Any, place: int = 0) -> Any:
    return page.locator(".stream").nth(place)


def begin(card: Any, prompt: str = RED) -> None:
    card.locator(".prompt").fill(prompt)
    card.locator(".prompt").press("Enter")


def await_state(card: Any, state: str) -> None:
    sync_api.expect(card).to_have_attribute("data-state", state, timeout=PATIENCE)


def seen(card: Any) -> tuple[float, float, float, float]:
    red, green, blue, check = card.evaluate(SEEN)
    return red, green, blue, check


def await_seen(page: Any, card: Any, holds: Callable[[tuple[float, float, float, float]], bool]) -> None:
    for _ in range(PATIENCE // 100):
        if holds(seen(card)):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"the picture stays {seen(card)}")


def changes(page: Any, card: Any, times: int = 3) -> bool:
    """Whether the picture becomes another one, so many times."""
    for _ in range(times):
        before = seen(card)[3]
        await_seen(page, card, lambda now, before=before: now[3] != before)  # type: ignore[misc]
    return True


def await_still(page: Any, card: Any) -> None:
    """The picture stays what it is for longer than a frame lasts, once what was on its way has come."""
    for _ in range(PATIENCE // 700):
        before = seen(card)
        page.wait_for_timeout(700)
        if seen(card) == before:
            return
    pytest.fail("the picture never stands still")


def play_media(card: Any, media: str) -> None:
    card.locator(".media").select_option(media)
    begin(card)
    await_state(card, "live")


@pytest.mark.parametrize("media", ["mp4", "jpeg"])
def test_it_plays_and_a_new_prompt_shows(server: StandIn, visit: Callable[..., Any], media: str) -> None:
    """Red on black, then white: seen in the pixels, in the timeline and in the list of prompts."""
    page = visit(server.url)
    card = card_of(page)
    play_media(card, media)
    assert changes(page, card)
    assert seen(card)[0] > 1.5 * seen(card)[1]
    assert sum(seen(card)[:3]) < 300
    begin(card, CYAN)
    await_seen(page, card, lambda now: min(now[:3]) > 120)
    sync_api.expect(card.locator(".track span")).to_have_text(["1", "2"])
    sync_api.expect(card.locator(".prompts .again")).to_have_text([CYAN, RED])
    assert "ms" in (text := card.locator(".switch").inner_text()) or text.endswith(" s")
    sync_api.expect(card.locator(".timeline")).to_have_attribute("aria-label", re.compile(f"{RED}, 0:00 to .*{CYAN}"))


def test_it_measures_what_it_shows(server: StandIn, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    card = card_of(page)
    play_media(card, "jpeg")
    sync_api.expect(card.locator(".gap-text")).to_have_text(re.compile(r"median \d.* · 95 % \d"))
    sync_api.expect(card.locator(".first")).to_have_text(re.compile(r"\d (ms|s)"))
    sync_api.expect(card.locator(".fps")).to_have_text(re.compile(r"\d\.\d"))
    sync_api.expect(page.locator(".server")).to_have_text(re.compile(r"2 workers · 1 stream · load \d+ %"))


def test_pause_resume_stop(server: StandIn, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    card = card_of(page)
    play_media(card, "jpeg")
    card.locator(".screen").press(" ")
    await_state(card, "paused")
    await_still(page, card)
    card.locator(".pause").click()
    await_state(card, "live")
    assert changes(page, card)
    card.locator(".stop").click()
    await_state(card, "stopped")
    assert [word for word in server.heard if word != "seen"] == ["pause", "resume", "stop"]
    begin(card, STAR)  # again, from the same card
    await_state(card, "live")


@pytest.mark.parametrize("media", ["mp4", "jpeg"])
def test_a_lost_socket_is_opened_again(server: StandIn, visit: Callable[..., Any], media: str) -> None:
    """The page asks for the first frame that it does not have, and goes on with the same stream."""
    page = visit(server.url)
    card = card_of(page)
    play_media(card, media)
    sync_api.expect(card.locator(".gap-text")).to_have_text(re.compile("median"))
    card.evaluate(NOTE_STATES)
    server.cut_sockets()
    page.wait_for_function("window.states.includes('lost') && window.states.at(-1) === 'live'")
    again = server.first_messages[-1]
    assert (again.type, again.stream, again.media) == ("reconnect", "stream-0", media)
    assert again.frame >= 9
    assert (again.frame - 9) % 4 == 0  # an edge between pieces: all before it was here
    assert changes(page, card)
    assert len(server.streams) == 1


def test_a_stream_that_fails_again_and_again_is_given_up(server: StandIn, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    page.clock.install()
    page.reload()
    card = card_of(page)
    begin(card)
    await_state(card, "live")
    server.fails = True
    server.cut_sockets()
    for _ in range(10):
        page.wait_for_timeout(200)
        page.clock.fast_forward(15_000)
    await_state(card, "error")
    sync_api.expect(card.locator(".notice")).to_have_text("the server failed")
    assert 3 < len(server.first_messages) <= 6


def test_delays_grow(server: StandIn, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    delays = page.evaluate(
        """async () => {
          const { delayOf } = await import("./wire.js");
          return [1, 2, 3, 4, 5, 6, 7].map((attempt) => delayOf(attempt, 0.5));
        }"""
    )
    assert delays == [500, 1000, 2000, 4000, 8000, 15000, 15000]


def picture_file() -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(render(parse(STAR)[0], 5, 1, size=64)[0]).save(file, "PNG")
    return {"name": "star.png", "mimeType": "image/png", "buffer": file.getvalue()}


DROP: Final = """([selector, name, type, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type }));
  const target = document.querySelector(selector);
  for (const event of ["dragenter", "dragover", "drop"])
    target.dispatchEvent(new DragEvent(event, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


def test_a_dropped_image_begins_the_stream(server: StandIn, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    card = card_of(page)
    file = picture_file()
    content = base64.b64encode(file["buffer"]).decode()
    page.evaluate(DROP, [".screen", file["name"], file["mimeType"], content])
    sync_api.expect(card.locator(".attachment-name")).to_have_text("star.png")
    begin(card)
    await_state(card, "live")
    assert base64.b64decode(server.first_messages[0].image) == file["buffer"]


def video_file() -> dict[str, Any]:
    """Two seconds of the sprites world as H.264."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for frame in render(parse(RED)[0], 2, 32, size=64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return {"name": "red.mp4", "mimeType": "video/mp4", "buffer": file.getvalue()}


def test_a_videos_frames_are_sent_when_they_are_due(server: StandIn, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    card = card_of(page)
    card.locator(".file").set_input_files(video_file())
    sync_api.expect(card.locator(".noise-field")).to_be_visible()
    begin(card, STAR)
    await_state(card, "live")
    assert changes(page, card)
    assert server.first_messages[0].source.noise == pytest.approx(0.6)
    card.locator(".stop").click()
    await_state(card, "stopped")
    assert 24 <= server.source_frames <= server.source_due


def test_other_files_are_refused(server: StandIn, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    card = card_of(page)
    for name, kind in (("notes.txt", "text/plain"), ("broken.mp4", "video/mp4")):
        card.locator(".file").set_input_files({"name": name, "mimeType": kind, "buffer": b"not a picture"})
        sync_api.expect(card.locator(".notice")).to_have_text(re.compile(name))
        sync_api.expect(card.locator(".attachment")).to_be_hidden()


def test_queue_busy_and_key(server: StandIn, visit: Callable[..., Any]) -> None:
    server.queue, server.key = (2, 1), "right"
    page = visit(server.url)
    card = card_of(page)
    sync_api.expect(page.locator(".server")).to_have_text("The server asks for a key")
    begin(card)
    sync_api.expect(card.locator(".notice")).to_have_text(re.compile("does not accept this key"))
    page.locator("#key").fill("right")
    page.locator("#key").press("Enter")
    page.evaluate(
        """() => {
          const chip = document.querySelector(".chip-text");
          window.said = [];
          new MutationObserver(() => window.said.push(chip.textContent)).observe(chip, { childList: true });
        }"""
    )
    begin(card)
    await_state(card, "live")
    said = [text for text in page.evaluate("window.said") if text != "Connecting"]
    assert said == ["Waiting · number 2 in line", "Waiting · next in line", "First frame is being made", "Live"]
    assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
    card.locator(".stop").click()
    server.queue, server.full = (), True
    begin(card)
    await_state(card, "busy")
    sync_api.expect(card.locator(".notice")).to_have_text(re.compile("full now. 2 of 2 sessions are taken"))


def test_streams_side_by_side(server: StandIn, visit: Callable[..., Any]) -> None:
    page = visit(server.url)
    begin(card_of(page))
    page.locator(".add").click()
    begin(card_of(page, 1), CYAN)
    await_state(card_of(page, 0), "live")
    await_state(card_of(page, 1), "live")
    one, other = card_of(page, 0).bounding_box(), card_of(page, 1).bounding_box()
    assert one["y"] == other["y"]
    assert one["x"] + one["width"] <= other["x"]
    await_seen(page, card_of(page, 1), lambda now: min(now[:3]) > 120)
    assert seen(card_of(page, 0))[2] < 100
    card_of(page, 1).locator(".remove").click()
    sync_api.expect(page.locator(".stream")).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(server: StandIn, visit: Callable[..., Any], scheme: str) -> None:
    """No sideways scrolling, fingers find the buttons, text stands out from its ground."""
    page = visit(server.url, 390, 844, color_scheme=scheme, device_scale_factor=2)
    page.locator(".key-toggle").click()
    card = card_of(page)
    begin(card)
    await_state(card, "live")
    begin(card, STAR)
    sync_api.expect(card.locator(".prompts li")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for button in card.locator("button:visible").all():
        box = button.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    assert _contrast(page, ".figures dt") > 4.5
    assert _contrast(page, ".go") > 4.5


def _contrast(page: Any, selector: str) -> float:
    """Contrast of a text to the ground behind it, as WCAG 2 defines it."""
    text, ground = page.evaluate(
        """(selector) => {
          let element = document.querySelector(selector);
          const text = getComputedStyle(element).color;
          while (getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
          return [text, getComputedStyle(element).backgroundColor];
        }""",
        selector,
    )
    light = sorted((_luminance(text), _luminance(ground)), reverse=True)
    return (light[0] + 0.05) / (light[1] + 0.05)


def _luminance(color: str) -> float:
    parts = [float(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_everything_by_keyboard(server: StandIn, visit: Callable[..., Any]) -> None:
    """Tab reaches the prompt, Enter starts, Tab reaches pause and stop; every control has a name."""
    page = visit(server.url)
    card = card_of(page)
    card.locator(".prompt").focus()
    page.keyboard.type(RED)
    page.keyboard.press("Enter")
    await_state(card, "live")
    reached = []
    for _ in range(4):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.className"))
    assert reached == ["go", "pause", "stop", "pick"]
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    await_state(card, "stopped")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")]
          .filter((field) => !field.hidden && !field.labels?.length && !field.ariaLabel && !field.textContent.trim())
          .map((field) => field.className)"""
    )
    assert nameless == []


def test_no_outside_resource(server: StandIn, visit: Callable[..., Any]) -> None:
    addresses: list[str] = []
    page = visit("about:blank")
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(server.url)
    begin(card_of(page))
    await_state(card_of(page), "live")
    assert len(addresses) > 6
    assert [address for address in addresses if not address.startswith((server.url, "data:", "blob:"))] == []


# --- The real server -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(small_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.LocalServer]:
    state = tmp_path_factory.mktemp("page") / "state"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "PATIENCE", START)
        with serving.LocalServer(small_student, state, model={"keep_every": 1, "load": 1.0, "size": SIZE}) as running:
            yield running


def kill_workers(server: serving.LocalServer) -> None:
    """As if their processes had died."""
    for worker in server.hands.workers:
        server.loop.call_soon_threadsafe(server.hands.kill, worker)


def play_slowly(page: Any, media: str) -> Any:
    """At a speed that the page does not offer: the test is not about how fast this machine is."""
    card = card_of(page)
    card.locator(".speed").evaluate("(select, rate) => select.add(new Option(rate, rate, true, true))", SLOWLY)
    play_media(card, media)
    assert changes(page, card)
    return card


@pytest.mark.parametrize("media", ["mp4", "jpeg"])
def test_the_real_server_plays_and_switches(real: serving.LocalServer, visit: Callable[..., Any], media: str) -> None:
    page = visit(real.url)
    card = play_slowly(page, media)
    begin(card, STAR)
    sync_api.expect(card.locator(".prompts .again")).to_have_text([STAR, RED])
    sync_api.expect(card.locator(".track span")).to_have_text(["1", "2"])
    sync_api.expect(card.locator(".track span.now")).to_have_text("2")
    assert changes(page, card)
    sync_api.expect(card.locator(".switch")).to_have_text(re.compile(r"\d (ms|s)"))
    sync_api.expect(page.locator(".server")).to_have_text(re.compile(r"1 worker · \d streams? · load \d+ %"))
    card.locator(".stop").click()
    await_state(card, "stopped")


def test_the_real_server_begins_from_an_image_and_a_video(real: serving.LocalServer, visit: Callable[..., Any]) -> None:
    """A stream that keeps to its first picture begins with it; one that redraws a video asks for its frames."""
    page = visit(real.url)
    card = card_of(page)
    for file in (picture_file(), video_file()):
        card.locator(".file").set_input_files(file)
        sync_api.expect(card.locator(".attachment-name")).to_have_text(file["name"])
        play_slowly(page, "jpeg")
        card.locator(".stop").click()
        await_state(card, "stopped")
        sync_api.expect(card.locator(".notice")).to_be_hidden()


def await_frames(page: Any, card: Any, count: int = 30) -> None:
    """So many more frames come, more than any worker had ready; they are seen, and none was lost.

    Another worker may have to be started before.
    """
    wanted, until = int(card.get_attribute("data-next")) + count, time.monotonic() + START
    while time.monotonic() < until:
        if int(card.get_attribute("data-next")) >= wanted:
            break
        page.wait_for_timeout(100)
    else:
        pytest.fail(f"frame {wanted} never comes: {card.inner_text()}")
    await_state(card, "live")
    assert changes(page, card)
    assert card.get_attribute("data-lost") == "0"


@pytest.mark.parametrize("media", ["mp4", "jpeg"])
def test_a_worker_that_dies_is_replaced_under_the_picture(
    real: serving.LocalServer, visit: Callable[..., Any], media: str
) -> None:
    page = visit(real.url)
    card = play_slowly(page, media)
    kill_workers(real)
    await_frames(page, card)
    card.locator(".stop").click()
    await_state(card, "stopped")


def test_a_killed_process_is_replaced_under_the_picture(
    ray_session: Any, small_student: Path, tmp_path: Path, visit: Callable[..., Any]
) -> None:
    """Kill -9 of a worker of a server on Ray."""
    from ray import serve

    from reelway.pipelines.serve.app import run
    from reelway.pipelines.serve.config import ModelConfig, ServeConfig
    from reelway.pipelines.serve.keys import Keyring

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    model = ModelConfig(path=str(small_student), keep_every=1, load=1.0)
    config = ServeConfig(models={"small": model}, state=str(tmp_path / "state"), port=port)
    try:
        run(config, Keyring())
        page = visit(f"http://127.0.0.1:{port}")
        card = play_slowly(page, "mp4")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/status", timeout=60) as answer:
            (worker,) = json.load(answer)["small"]["workers"]
        os.kill(worker["pid"], signal.SIGKILL)
        await_frames(page, card)
    finally:
        serve.shutdown()
