"""A halo counts as measured only where a seam was seen."""

from __future__ import annotations

import pytest

import unet_rt as urt
from unet_rt.cli.demo import shipped_model
from unet_rt.drawing.microscopy import microscopy

pytestmark = pytest.mark.onnxruntime


def build(tmp_path, count, **options):
    reports = []
    samples = [microscopy((64, 64), seed=seed).image for seed in range(500, 500 + count)]
    options |= {"samples": samples, "out": tmp_path / "x.urt", "backend": "onnxruntime", "precision": "fp32"}
    urt.build(shipped_model(), tile=(128, 128), report=reports.append, **options).close()
    return reports[0]


def test_samples_too_small_to_show_a_seam_measure_nothing(tmp_path):
    """Of 64 px a tile with a halo of 32 covers all: no seam, no error, and no measurement either."""
    report = build(tmp_path, 12, halo="measured", budget=urt.Budget(seam=0.0))
    assert max(report.seams) == 24
    assert report.seams[24] > 0
    assert (report.spec.halo, report.spec.halo_limit) == ("exact", None)
    assert any("too small to see the seams" in note for note in report.notes)


def test_the_seams_of_a_given_halo_are_recorded(tmp_path):
    report = build(tmp_path, 3, halo=8, budget=urt.Budget(label_change=1, dice=0))
    assert (report.spec.halo, report.spec.halo_limit) == ("given", 8)
    assert report.seams[8] > 0
    assert any(f"seams change {report.seams[8]:.2e} of labels" in note for note in report.notes)
    with pytest.raises(urt.TileError, match="negative"):
        build(tmp_path, 3, halo=-8, overwrite=True)
