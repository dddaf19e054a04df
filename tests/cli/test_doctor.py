"""The doctor's report: complete, JSON, and honest about what is broken."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

import unet_rt
from unet_rt import backends
from unet_rt.backends import openvino
from unet_rt.cli import doctor
from unet_rt.errors import BackendError
from unet_rt.kernels import native as kernels
from unet_rt.system import facts as machine
from unet_rt.system import limits


def test_the_report_is_json_and_says_everything() -> None:
    report = doctor.collect()
    assert json.loads(json.dumps(report)) == report
    assert report["unet_rt"] == unet_rt.__version__
    assert report["cpu"]["threads"] == limits.threads()
    assert list(report["backends"]) == ["onnxruntime", "openvino", "tensorrt", "ncnn", "eager"]
    text = doctor.format(report)
    for name, backend in report["backends"].items():
        assert name in text
        for device, reason in backend["missing"].items():
            assert (reason is None) == (device in backend["precisions"])
            assert (reason or backend["version"]) in text
    assert report["cpu"]["name"] in text
    assert all(f"{name} {version}" in text for name, version in report["versions"].items())
    assert all(line == line.rstrip() for line in text.splitlines())


@pytest.mark.onnxruntime
def test_a_usable_backend_needs_no_advice() -> None:
    report = doctor.collect()
    assert report["backends"]["onnxruntime"]["missing"]["cpu"] is None
    assert report["backends"]["onnxruntime"]["precisions"]["cpu"] == ["fp32", "int8"]
    assert report["advice"] is None
    assert "ADVICE" not in doctor.format(report)


def test_without_a_backend_it_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "openvino", "ncnn", "torch"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]  # import machinery: not to be found
    monkeypatch.setattr(machine, "package_version", lambda name: None)
    report = doctor.collect()
    assert {backend["version"] for backend in report["backends"].values()} == {None}
    assert report["advice"] == f"no backend is usable; install one: {backends.install_line()}"
    assert report["advice"] in doctor.format(report)


def test_a_broken_backend_is_a_finding_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str = "cpu") -> None:
        raise BackendError("OpenVINO is installed but cannot be imported (libtbb.so.12)")

    monkeypatch.setattr(openvino, "missing", broken)
    report = doctor.collect()
    reason = report["backends"]["openvino"]["missing"]["cpu"]
    assert reason == "broken: OpenVINO is installed but cannot be imported (libtbb.so.12)"
    assert reason in doctor.format(report)


def test_two_onnxruntime_wheels_are_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "package_folder", lambda name: Path("site-packages"))
    (conflict,) = doctor.collect()["conflicts"]
    assert "overwrite each other's files" in conflict
    assert f"CONFLICT     {conflict}" in doctor.format(doctor.collect())


def test_gpus_are_listed_with_every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cuda", lambda: machine.Cuda(("NVIDIA A", "NVIDIA B"), "13.1", None))
    report = doctor.collect()
    for name, backend in report["backends"].items():
        others = [device for device in backend["missing"] if not device.startswith("vulkan")]
        assert others == (["cpu"] if name == "ncnn" else ["cpu", "cuda:0", "cuda:1"])
    text = doctor.format(report)
    assert "cuda:1 NVIDIA B, driver for CUDA 13.1" in text


def test_native_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.collect()
    if importlib.util.find_spec("unet_rt._cpu") is not None:
        assert report["native"]["_cpu"]["missing"] is None
        assert report["native"]["_cpu"]["compiler"]
        if importlib.util.find_spec("unet_rt._cuda") is None:
            assert report["native"]["_cuda"]["missing"] == kernels.cuda_status()
            assert f"absent: {kernels.cuda_status()}" in doctor.format(report)

    def unbuilt() -> str:
        raise BackendError("the compiled module unet_rt._cpu is missing; pip install .")

    monkeypatch.setattr(kernels, "cuda_status", unbuilt)
    report = doctor.collect()
    assert report["native"]["_cpu"]["missing"] == "the compiled module unet_rt._cpu is missing; pip install ."
    assert "the compiled module unet_rt._cpu is missing" in doctor.format(report)
