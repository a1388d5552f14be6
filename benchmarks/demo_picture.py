"""The README's picture of the demo's page: from the tiles to the long stream, while the videos play.

    python benchmarks/demo_picture.py --demo demo --out docs/demo.png

Needs playwright and a Chromium. Looks at the page as it is: run `make demo` before.
"""

import io
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from playwright.sync_api import Page, sync_playwright

WIDTH = 1100
COLORS = 256  # of the file: it stays under 300 kB
SETTLE_MS = 1500  # from scrolling to a section until its videos play


def main(
    demo: Annotated[Path, typer.Option(help="Folder of a demo that is done.")] = Path("demo"),
    out: Annotated[Path, typer.Option(help=".png")] = Path("docs/demo.png"),
    chromium: Annotated[Path, typer.Option(help="The browser.")] = Path("/usr/bin/chromium"),
) -> None:
    """Take the picture."""
    page = demo / "index.html"
    for path in (page, chromium):
        if not path.is_file():
            raise typer.BadParameter(f"no such file: {path}")
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        picture = _picture(browser.new_page(viewport={"width": WIDTH, "height": 1200}), page)
        browser.close()
    small = Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLORS, dither=Image.Dither.FLOYDSTEINBERG)
    small.save(out, optimize=True)
    typer.echo(f"{out}: {small.width}x{small.height}, {out.stat().st_size / 1000:.0f} kB")


def _picture(page: Page, address: Path) -> bytes:
    page.goto(address.resolve().as_uri())
    for section in ("#long", "#twice"):
        page.locator(section).scroll_into_view_if_needed()
        page.wait_for_timeout(SETTLE_MS)
    end = page.evaluate("document.querySelector('#long').getBoundingClientRect().bottom + window.scrollY")
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": end + 24}
    return page.screenshot(full_page=True, clip=clip)


if __name__ == "__main__":
    typer.run(main)
