"""Take the picture of the server's page that the documentation shows: several streams of a real student, one of which
has followed a new prompt.

    python benchmarks/page_picture.py --student assets/tiny-student --out docs/serve.png

Starts `reelway serve`, plays in a headless Chromium, and ends both. A machine that is busy wants a lower `--fps`.
"""

import io
import shutil
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from PIL import Image
from playwright.sync_api import Page, sync_playwright
from serving_server import Server

MOST_BYTES: Final = 300_000
PATIENCE: Final = 120_000  # milliseconds
BEFORE, AFTER = 6.0, 8.0  # seconds of video under the first prompt, and under the second
WIDE, PHONE = (1280, 860), (390, 844)
PROMPTS: Final = (
    ("a large red circle circling fast on black", "a big yellow star bouncing slowly on navy"),
    ("a large cyan square circling fast on white", ""),
    ("a big green diamond drifts slowly right on white", ""),
)
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")


def play(page: Page, place: int, prompt: str, fps: int) -> Any:
    """Begin a stream in the card at a place, and wait until it is live."""
    while page.locator(".stream").count() <= place:
        page.locator(".add").click()
    card = page.locator(".stream").nth(place)
    card.locator(".speed").evaluate(
        "(select, rate) => select.add(new Option(`${rate} fps`, rate, true, true))", str(fps)
    )
    card.locator(".seed").fill(str(7 + place))
    write(card, prompt)
    page.wait_for_function("(card) => card.dataset.state === 'live'", arg=card.element_handle(), timeout=PATIENCE)
    return card


def write(card: Any, prompt: str) -> None:
    card.locator(".prompt").fill(prompt)
    card.locator(".go").click()


def shows(page: Page, card: Any, seconds: float) -> None:
    """Wait until a stream's clock has come so far."""
    page.wait_for_function(
        """([card, seconds]) => {
          const [minutes, rest] = card.querySelector(".clock").textContent.split(":").map(Number);
          return 60 * minutes + rest >= seconds;
        }""",
        arg=[card.element_handle(), seconds],
        timeout=PATIENCE,
    )


def take(page: Page) -> bytes:
    """A picture of the whole page, small enough for a README."""
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)
    time.sleep(0.5)
    picture = page.screenshot(full_page=True)
    if len(picture) > MOST_BYTES:
        file = io.BytesIO()
        Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
        picture = file.getvalue()
    return picture


def main(
    student: Annotated[Path, typer.Option(help="Student's folder.")] = Path("assets/tiny-student"),
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("docs/serve.png"),
    phone: Annotated[Path | None, typer.Option(help="A second picture, as wide as a phone, of one stream.")] = None,
    fps: Annotated[int, typer.Option(min=1, max=24, help="Of each of the three streams.")] = 8,
) -> None:
    """Play, switch a prompt, and take the picture."""
    browser_path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser_path is None:
        raise FileNotFoundError(f"none of {', '.join(BROWSERS)} is in PATH")
    model = {"path": str(student.absolute())}
    with Server({"models": {student.name: model}}) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDE[0], "height": WIDE[1]}, color_scheme="light")
        page.set_default_timeout(PATIENCE)
        page.goto(server.url)
        cards = [play(page, place, prompts[0], fps) for place, prompts in enumerate(PROMPTS)]
        shows(page, cards[0], BEFORE)
        write(cards[0], PROMPTS[0][1])
        shows(page, cards[0], BEFORE + AFTER)
        out.write_bytes(take(page))
        page.close()
        if phone is not None:
            page = browser.new_page(
                viewport={"width": PHONE[0], "height": PHONE[1]}, device_scale_factor=2, color_scheme="light"
            )
            page.goto(server.url)
            card = play(page, 0, PROMPTS[0][0], fps)
            shows(page, card, BEFORE)
            write(card, PROMPTS[0][1])
            shows(page, card, BEFORE + AFTER)
            phone.write_bytes(take(page))
        browser.close()
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    typer.run(main)
