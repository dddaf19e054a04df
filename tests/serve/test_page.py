"""The page in a real browser: Debian's chromium, driven by Playwright (``make test-browser``)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import unet_rt
import unet_rt as urt
from unet_rt.drawing.microscopy import microscopy

STATIC = Path(unet_rt.__file__).parent / "serve" / "static"
# openseadragon 6.1.1 from the npm registry: build/openseadragon/openseadragon.min.js and LICENSE.txt.
VENDOR = {
    "openseadragon.min.js": "14d587cd3ee7c4861f1a41077ce642029364a21029956ba635bd8fb1202cf9ad",
    "openseadragon.LICENSE.txt": "17da96b26ac706d2cbd06d4555dedb43026782f4943faf0156fe7acf89454228",
}


def test_what_others_wrote_is_unmodified_and_has_its_licence() -> None:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (STATIC / "vendor").iterdir()}
    assert found == VENDOR


def test_the_page_asks_nobody_else() -> None:
    for name in ("index.html", "page.js", "page.css"):
        assert "//" not in (STATIC / name).read_text("utf-8").replace("// The page", ""), name


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="make test-browser runs this")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium; apt-get install chromium, then make test-browser")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def wrong() -> list[str]:
    """What the browser complains of."""
    return []


@pytest.fixture
def page(browser: Any, wrong: list[str], engine_folder: Path) -> Iterator[Any]:
    from test_serve import Running

    running = Running(engine_folder)
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    opened.goto(running.url)
    yield opened
    opened.close()
    running.close()
    assert not wrong


def masked_share(page: Any) -> float:
    """Share of the viewer's canvas that is not grey: where the mask is seen."""
    return page.evaluate(
        """() => { const c = document.querySelector('#viewer canvas'), d = c.getContext('2d');
        const p = d.getImageData(0, 0, c.width, c.height).data; let n = 0;
        for (let i = 0; i < p.length; i += 4) n += Math.abs(p[i] - p[i + 2]) > 24;
        return n / (p.length / 4); }"""
    )


def wait_for_share(page: Any, low: float, high: float) -> float:
    for _ in range(100):
        share = masked_share(page)
        if low <= share <= high:
            return share
        page.wait_for_timeout(100)
    raise AssertionError(f"{share} of the picture shows a mask, not {low} to {high}")


@pytest.mark.onnxruntime
@pytest.mark.parametrize(("kind", "shape"), [("png", (640, 900)), ("tif", (6000, 6000))])
def test_drop_an_image_and_see_its_mask(
    page: Any, engine_folder: Path, tmp_path: Path, kind: str, shape: tuple[int, int]
) -> None:
    import tifffile

    drawn = microscopy((600, 600), seed=9).image
    image = np.tile(drawn, (10, 10))[: shape[0], : shape[1]] if kind == "tif" else microscopy(shape, seed=3).image
    path = tmp_path / f"image.{kind}"
    if kind == "tif":
        tifffile.imwrite(path, image, photometric="minisblack")
    else:
        Image.fromarray(image).save(path)
    with urt.load(engine_folder) as engine:
        expected = urt.predict(engine, path)
    # A drop, as the browser makes one of a file that is dragged in.
    page.set_input_files("#file", [])
    if kind == "png":
        data = list(path.read_bytes())
        page.evaluate(
            """(data) => { const t = new DataTransfer(); t.items.add(new File([new Uint8Array(data)], 'image.png'));
            document.dispatchEvent(new DragEvent('drop', {dataTransfer: t, bubbles: true, cancelable: true})); }""",
            data,
        )
    else:
        page.set_input_files("#file", path)
    page.locator("#status", has_text="objects").wait_for(timeout=120_000)
    share = wait_for_share(page, 0.01, 0.9)
    _, objects = urt.label_mask(expected)
    assert f"{len(objects)} objects" in page.inner_text("#status")
    cells = [row.split("\t")[2] for row in page.inner_text("#objects").splitlines()]
    assert cells == [str(n) for n in objects.area_px[: len(cells)]]
    assert len(cells) == min(1000, len(objects))

    with page.expect_download() as saved:
        page.click("#save-mask")
    assert np.array_equal(np.asarray(Image.open(saved.value.path())), expected)
    with page.expect_download() as saved:
        page.click("#save-outlines")
    assert len(json.loads(Path(saved.value.path()).read_text())["features"]) == len(objects)

    page.fill("#opacity", "0")
    wait_for_share(page, 0, share / 50)
    page.fill("#opacity", "60")
    wait_for_share(page, share / 2, 1)
    if kind == "png":
        page.screenshot(
            path=Path(os.environ.get("UNET_RT_SCREENSHOTS", tmp_path)) / "serve.jpg", type="jpeg", quality=80
        )
    page.uncheck("#classes input")
    wait_for_share(page, 0, share / 50)
    page.check("#classes input")
    wait_for_share(page, share / 2, 1)

    page.click("#objects tr:nth-child(3)")
    assert page.get_attribute(".box", "data-object") == "3"
    page.wait_for_timeout(600)
    page.click("#pixels")
    page.wait_for_timeout(600)
    zoom = page.evaluate("shown().viewportToImageZoom(viewer.viewport.getZoom())")
    assert zoom == pytest.approx(8)
    assert "onnxruntime" in page.inner_text("#about")


@pytest.mark.onnxruntime
def test_an_error_is_shown_in_words(page: Any, wrong: list[str], tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"GIF89a and more")
    page.set_input_files("#file", tmp_path / "no.png")
    page.wait_for_selector("#status.error")
    assert "no PNG, TIFF or npy" in page.inner_text("#status")
    wrong.clear()  # the browser itself logs the status
