"""Drawn microscopy: the same in every window, truthful, and like what a camera gives."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_rt.drawing.microscopy import CAMERA_OFFSET, IDS_PER_BLOCK, Micrograph, microscopy
from unet_rt.drawing.scene import Scene, random_scene
from unet_rt.drawing.tissue import Tissue
from unet_rt.errors import ImageError

SHAPE = (700, 1100)  # two rows and three columns of blocks, none of them whole at the far edges


@pytest.fixture(scope="module")
def whole() -> Micrograph:
    return microscopy(SHAPE, seed=5)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_a_window_is_that_part_of_the_whole(whole: Micrograph, data: st.DataObject) -> None:
    start = [data.draw(st.integers(0, n - 1)) for n in SHAPE]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, SHAPE, strict=True)]
    part = microscopy(SHAPE, seed=5, window=(start, stop))
    cut = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    np.testing.assert_array_equal(part.image, whole.image[cut])
    np.testing.assert_array_equal(part.truth, whole.truth[cut])


def test_the_seed_decides(whole: Micrograph) -> None:
    window = ((0, 0), (300, 300))
    again = microscopy(SHAPE, seed=5, window=window)
    other = microscopy(SHAPE, seed=6, window=window)
    np.testing.assert_array_equal(again.image, whole.image[:300, :300])
    assert (other.truth != again.truth).mean() > 0.05


def test_no_block_shows_in_the_pixels(whole: Micrograph) -> None:
    """Seams between blocks would be steps in the background, larger there than elsewhere."""
    image, background = whole.image.astype(float), whole.truth == 0
    for axis, at in ((0, 512), (1, 512), (1, 1024)):
        step = np.abs(np.diff(image, axis=axis))
        both = background & np.roll(background, -1, axis)
        both = both[:-1] if axis == 0 else both[:, :-1]
        line = [slice(None)] * 2
        line[axis] = slice(at - 1, at)
        at_seam = np.median(step[tuple(line)][both[tuple(line)]])
        everywhere = np.median(step[both])
        assert at_seam < 1.3 * everywhere


def test_nuclei_are_brighter_than_background_and_covered_as_asked(whole: Micrograph) -> None:
    foreground = whole.truth > 0
    # Median nucleus 400 e, background 40 e, two grey levels per electron.
    assert np.median(whole.image[foreground]) > 3 * np.median(whole.image[~foreground].astype(float) - CAMERA_OFFSET)
    assert 0.6 * whole.scene.cover < foreground.mean() < 1.3 * whole.scene.cover
    assert whole.image.min() > 0


def test_many_nuclei_touch_and_each_is_one_piece(whole: Micrograph) -> None:
    from scipy import ndimage

    truth = whole.truth
    right, left = truth[:, 1:], truth[:, :-1]
    touching = (right != left) & (right > 0) & (left > 0)
    in_contact = set(right[touching].tolist()) | set(left[touching].tolist())
    ids = np.unique(truth[truth > 0])
    assert len(in_contact) > 0.3 * len(ids)
    inner = [k for k in ids if k not in set(np.r_[truth[0], truth[-1], truth[:, 0], truth[:, -1]].tolist())]
    pieces = [ndimage.label(truth == k)[1] for k in inner[:: max(1, len(inner) // 40)]]
    assert np.mean(np.array(pieces) == 1) > 0.95


def test_noise_is_shot_noise_and_read_noise() -> None:
    """An empty field: variance of a Poisson count and of the read noise, in grey levels (gain 2)."""
    flat = Scene(cover=0, debris_per_mpx=0, shading=0, haze=0, background_e=200, read_e=5, blur_px=0)
    levels = microscopy((512, 512), scene=flat).image.astype(float)
    expected = 4 * (200 + 25) + 1 / 12  # rounding to whole levels
    # The variance of 2^18 samples is known to 0.28 %; five deviations.
    assert levels.var() == pytest.approx(expected, rel=5 * np.sqrt(2 / levels.size))
    assert levels.mean() == pytest.approx(CAMERA_OFFSET + 400, abs=5 * np.sqrt(expected / levels.size))


def test_debris_is_bright_rare_and_not_in_the_truth() -> None:
    clean, dirty = (microscopy((512, 512), seed=3, scene=Scene(debris_per_mpx=d)) for d in (0, 40))
    np.testing.assert_array_equal(clean.truth, dirty.truth)
    difference = dirty.image.astype(float) - clean.image
    assert difference.max() > 1000
    assert 0 < (difference > 200).mean() < 0.01


def test_uint8_is_exposed_without_clipping_the_nuclei() -> None:
    m = microscopy((512, 512), seed=2, dtype=np.uint8)
    assert m.image.dtype == np.uint8
    # White is 2.5 median nuclei; light falls off by blur, shading and thickness to about 0.7 of the median nucleus.
    assert 40 < np.median(m.image[m.truth > 0]) < 100
    assert (m.image == 255).mean() < 0.01


def test_random_scenes_differ() -> None:
    scenes = [random_scene(k) for k in range(20)]
    assert max(s.radius_px for s in scenes) > 2 * min(s.radius_px for s in scenes)
    assert random_scene(3) == random_scene(3)


def test_ids_are_unique_across_blocks(whole: Micrograph) -> None:
    """Two nuclei that begin in different blocks never share an id: an id's pixels lie within two blocks' reach."""
    for number in np.unique(whole.truth)[1::25]:
        y, x = np.nonzero(whole.truth == number)
        assert np.ptp(y) < 100
        assert np.ptp(x) < 100
    assert whole.truth.max() < 5 * 5 * IDS_PER_BLOCK


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"shape": (0, 5)}, "at least 1 px"),
        ({"shape": (5, 5, 5)}, "height, width"),
        ({"shape": (5, 5), "dtype": np.float32}, "float32"),
        ({"shape": (5, 5), "window": ((0, 0), (6, 5))}, "leaves the image"),
        ({"shape": (5, 5), "seed": -1}, "seed -1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ImageError, match=said):
        microscopy(**arguments)  # type: ignore[arg-type]


def test_a_scene_out_of_range_is_refused() -> None:
    with pytest.raises(ImageError, match=r"radius_px is 100.*use 2 to 40"):
        Scene(radius_px=100)


@pytest.mark.parametrize("drawn", [Scene, Tissue])
def test_every_number_of_what_is_drawn_has_limits(drawn: type[Scene] | type[Tissue]) -> None:
    for name in drawn.__dataclass_fields__:
        with pytest.raises(ImageError, match=f"{drawn.__name__.lower()} {name} is nan; use "):
            drawn(**{name: float("nan")})


def test_drawing_needs_neither_torch_nor_scipy() -> None:
    code = (
        "import sys; from unet_rt.drawing.microscopy import microscopy; microscopy((64, 64)); "
        "print(sorted({'torch', 'scipy', 'skimage', 'onnx'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
