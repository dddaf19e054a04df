"""Engines by all that decided them: what is another build, what is the same, and what processes do to each other."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import unet_rt as urt
from unet_rt.baseline.model import open_model
from unet_rt.baseline.samples import SampleWindow, draw
from unet_rt.building import cache
from unet_rt.building.cache import EngineCache, cache_key, copy_folder, digest_inputs, digest_request, list_differences
from unet_rt.building.job import BuildOptions
from unet_rt.cli.demo import shipped_model
from unet_rt.cli.main import main
from unet_rt.cli.parser import make_parser
from unet_rt.contract.contract import Contract, Normalization
from unet_rt.engine.folder import read_folder
from unet_rt.system import facts as machine

pytestmark = pytest.mark.onnxruntime
BUILD = importlib.import_module("unet_rt.building.build")  # the package's name ``build`` is the function
OPTIONS: dict[str, Any] = {"backend": "onnxruntime", "precision": "fp32", "tile": (64, 64), "halo": 8, "threads": 1}


@pytest.fixture(scope="module")
def images(sample_images: list[NDArray[np.uint16]]) -> list[NDArray[np.uint16]]:
    return [np.ascontiguousarray(image[:120, :120]) for image in sample_images]


def request(device: str = "cpu", **changed: Any) -> dict[str, str]:
    """The digests of a build with these options."""
    options = BuildOptions(urt.Budget(), "auto", "auto", None, "auto", None, "gaussian", "even", 1, True, 10.0)
    return digest_request(replace(options, **changed), ["onnxruntime"], device)


def nothing_is_built(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BUILD, "try_candidates", lambda *args, **kwargs: pytest.fail("it was built again"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the same and another -----------------------------------------------------------------------------------------------


def test_what_was_built_is_not_built_again(
    images: list[NDArray[np.uint16]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, however they are handed over; anything else is refused, and says what is another."""
    out = tmp_path / "a.urt"
    urt.build(shipped_model(), samples=images, out=out, **OPTIONS).close()
    before = contents(out)
    nothing_is_built(monkeypatch)
    said, reports = list[str](), list[Any]()
    with urt.build(
        shipped_model(), samples=[i.copy() for i in images], out=out, say=said.append, report=reports.append, **OPTIONS
    ) as engine:
        assert engine.spec.backend == "onnxruntime"
    assert any("is up to date" in text for text in said)
    assert reports == []
    assert contents(out) == before
    brighter = [images[0].copy(), *images[1:]]
    brighter[0][60, 60] += 1
    for part, changed in (
        ("samples", {"samples": brighter}),
        ("options", {"budget": urt.Budget(label_change=2e-3)}),
        ("options", {"tile": (80, 80)}),
        ("options", {"threads": 2}),
        ("contract", {"contract": Contract(threshold=(), classes=("a", "b"))}),
    ):
        with pytest.raises(urt.OutputError, match=f"was built from another {part}.*--overwrite"):
            urt.build(shipped_model(), out=out, **{"samples": images, **OPTIONS, **changed})
    assert contents(out) == before


def test_every_part_of_the_key(tmp_path: Path, images: list[NDArray[np.uint16]], monkeypatch: Any) -> None:
    """Code, versions, processor and device; weights in a file beside the graph; pixels and their normalisation."""
    first = request()
    assert request() == first
    assert request(tile=(64, 64))["options"] != first["options"]
    assert request(device="cuda:0")["machine"] != first["machine"]
    with monkeypatch.context() as patch:
        patch.setattr(machine, "cpu_features", lambda: frozenset({"avx2"}))
        assert request()["machine"] != first["machine"]
    with monkeypatch.context() as patch:
        patch.setattr(machine, "package_version", lambda name: "1.0")
        assert request()["machine"] != first["machine"]
    real = machine.package_version
    for name in (name for names in machine.DISTRIBUTIONS.values() for name in names):  # each library is in the key
        with monkeypatch.context() as patch:
            patch.setattr(machine, "package_version", lambda asked, name=name: "0" if asked == name else real(asked))
            assert request()["machine"] != first["machine"], name
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_digest_code", lambda: "a pass was changed")
        assert request()["code"] != first["code"]

    proto = onnx.load(shipped_model())
    onnx.save_model(
        proto, tmp_path / "beside.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )

    def opened(work: str) -> dict[str, str]:
        (tmp_path / work).mkdir()
        model = open_model(tmp_path / "beside.onnx", tmp_path / work)
        return digest_inputs(model.given, model.contract, [])

    before = opened("1")
    assert opened("2") == before
    weights = bytearray((tmp_path / "weights.bin").read_bytes())
    weights[-3] ^= 1
    (tmp_path / "weights.bin").write_bytes(weights)
    assert opened("3")["model"] != before["model"]

    contract = Contract(normalization=Normalization("zscore"))
    windows = draw(images, contract, spatial=2, network_channels=1)
    asked = digest_inputs(shipped_model(), contract, windows)
    assert digest_inputs(shipped_model(), contract, windows) == asked
    moved = [_shifted(windows[0]), *windows[1:]]
    assert digest_inputs(shipped_model(), contract, moved)["samples"] != asked["samples"]
    assert digest_inputs(shipped_model(), contract, windows[1:])["samples"] != asked["samples"]
    assert digest_inputs(shipped_model(), contract, windows[::-1])["samples"] != asked["samples"]
    assert digest_inputs(shipped_model(), Contract(), windows)["contract"] != asked["contract"]
    assert len({cache_key({**asked, **first, "code": str(k)}) for k in range(3)}) == 3


def _shifted(sample: SampleWindow) -> SampleWindow:
    """The same pixels of an image of other statistics."""
    return replace(sample, numbers=replace(sample.numbers, offset=sample.numbers.offset + 1))


def test_a_cache_of_engines(
    images: list[NDArray[np.uint16]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One build for any number of folders; an engine that was damaged in the cache is built anew and put back."""
    kept = tmp_path / "cache"
    urt.build(shipped_model(), samples=images, out=tmp_path / "a.urt", cache=kept, **OPTIONS).close()
    (place,) = kept.iterdir()
    assert contents(place) == contents(tmp_path / "a.urt")
    with monkeypatch.context() as patch:
        nothing_is_built(patch)
        urt.build(shipped_model(), samples=images, out=tmp_path / "b.urt", cache=kept, **OPTIONS).close()
    assert contents(tmp_path / "b.urt") == contents(tmp_path / "a.urt")
    np.save(tmp_path / "0.npy", images[0])
    command = ["build", str(shipped_model()), "--samples", str(tmp_path / "0.npy"), "--json"]
    command += ["--backend", "onnxruntime", "--precision", "fp32", "--tile", "64x64", "--halo", "8", "--threads", "1"]
    monkeypatch.setenv("UNET_RT_CACHE", "")
    assert make_parser().parse_args(command).cache is None, "nowhere, not the current folder"
    monkeypatch.setenv("UNET_RT_CACHE", str(kept))
    assert main([*command, "--out", str(tmp_path / "c.urt")]) == 0
    assert "up_to_date" not in json.loads(capsys.readouterr().out)
    assert len(list(kept.iterdir())) == 2, "other samples are another key"
    assert main([*command, "--out", str(tmp_path / "d.urt")]) == 0
    assert json.loads(capsys.readouterr().out)["up_to_date"] is True
    for path in place.glob("graph-*"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    urt.build(shipped_model(), samples=images, out=tmp_path / "e.urt", cache=kept, **OPTIONS).close()
    read_folder(place)
    asked = read_folder(place).spec.options["asked"]
    assert not list_differences(read_folder(tmp_path / "e.urt"), asked)
    found = EngineCache(kept).get(asked)
    assert found is not None
    assert EngineCache(kept).get({**asked, "samples": "0"}) is None


def test_the_cache_cannot_fail_a_build(
    images: list[NDArray[np.uint16]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot be written keeps nothing, one whose engine vanishes under a copy gives nothing: both are said."""
    blocked, out = tmp_path / "cache", tmp_path / "a.urt"
    blocked.write_text("a file where the folder should be")
    for _ in range(2):  # built, and up to date
        said = list[str]()
        urt.build(shipped_model(), samples=images, out=out, cache=blocked, say=said.append, **OPTIONS).close()
        assert any("not kept in the cache: " in text for text in said)
    asked = read_folder(out).spec.options["asked"]
    kept = EngineCache(tmp_path / "kept")
    kept.put(read_folder(out), asked)
    found = kept.get(asked)
    assert found is not None
    graph = found.file("graph")
    for spoil in (lambda: graph.write_bytes(graph.read_bytes()[:-1] + b"x"), graph.unlink):
        spoil()  # after it was found whole
        with monkeypatch.context() as patch:
            patch.setattr(EngineCache, "get", lambda self, asked: found)
            said = []
            assert not BUILD._reuse(BUILD.Target(tmp_path / "b.urt", False, kept, said.append), None, asked)
        assert not (tmp_path / "b.urt").exists()
        assert "not taken from the cache" in said[0]
        assert str(graph) in said[0]
    with pytest.raises(urt.EngineError):
        kept.put(found, {**asked, "samples": "0"})
    assert len(list(kept.folder.iterdir())) == 1, "what is not whole gets no place"
    kept.put(read_folder(out), asked)
    assert kept.get(asked) is not None, "and is replaced"


def test_another_process_may_put_the_same_engine_first(
    engine_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the copy: theirs stays, and nothing is wrong."""
    engine = read_folder(engine_folder)
    asked = engine.spec.options["asked"]
    ours, theirs = EngineCache(tmp_path), EngineCache(tmp_path)
    times = list[int]()

    def copied(*args: Any, **kwargs: Any) -> Any:
        if not times:
            times.append(1)
            theirs.put(engine, asked)
            times.append(ours._place(asked).stat().st_ino)
        return copy_folder(*args, **kwargs)

    monkeypatch.setattr(cache, "copy_folder", copied)
    ours.put(engine, asked)
    assert ours._place(asked).stat().st_ino == times[1]


def test_every_argument_of_build_is_in_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A new argument decides about engines until it is listed here as one that does not."""
    seen: list[BuildOptions] = []

    def first(options: BuildOptions, backends: Any, device: str) -> dict[str, str]:
        seen.append(options)
        raise RuntimeError("far enough")

    monkeypatch.setattr(BUILD, "digest_request", first)
    with pytest.raises(RuntimeError, match="far enough"):
        urt.build(shipped_model(), out=tmp_path / "a.urt", device="cpu", backend="onnxruntime")
    recorded = {option.name for option in fields(seen[0])}
    by_content = {
        "model",
        "contract",
        "samples",
        "axes",
        "channels",
        "series",
        "nodata",
    }  # hashed, or select
    machine_side = {"device"}
    elsewhere = {"out", "overwrite", "cache", "say", "tell", "report"}  # say where and how, not what
    assert set(inspect.signature(urt.build).parameters) == recorded | by_content | machine_side | elsewhere


def test_options_of_numpy_are_those_of_python(tmp_path: Path) -> None:
    """A tile out of an array is a tile; what is no option is refused instead of hashed by its address."""
    plain = request(tile=(64, 64), search_minutes=2.0, keep_exam=True)
    tile = np.array([64, 64])
    assert request(tile=tile, search_minutes=np.float64(2), keep_exam=np.bool_(True)) == plain
    assert request(tile=tuple(tile), search_minutes=np.float32(2), keep_exam=True) == plain
    with pytest.raises(TypeError):
        request(tile=object())


# --- processes ----------------------------------------------------------------------------------------------------------

# A build in a process of its own, which may stop at a place and say so.
PROCESS = """
import json, os, sys, time
from pathlib import Path
import numpy as np
import unet_rt as urt
from unet_rt.building import candidates
from unet_rt.engine import write
where, options, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])

def stop(*args, **kwargs):
    (folder / "stopped").touch()
    time.sleep(600)

if where == "measuring":
    candidates.interleaved_times = stop
elif where == "writing":
    os.fsync = stop  # every file is there, none is in place
elif where == "placing":
    real = write.only_writer
    def placing(parent):
        if any(parent.glob(".*.part/spec.json")):
            stop()
        return real(parent)
    write.only_writer = placing
images = [np.load(path) for path in sorted(folder.glob("image-*.npy"))]
urt.build(urt.shipped_model(), samples=images, **options).close()
"""


def started(where: str, folder: Path, **options: Any) -> subprocess.Popen[str]:
    given = json.dumps({**OPTIONS, **options})
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, where, given, str(folder)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def on_disk(images: list[NDArray[np.uint16]], tmp_path: Path) -> Path:
    for k, image in enumerate(images):
        np.save(tmp_path / f"image-{k}.npy", image)
    return tmp_path


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("where", ["measuring", "writing", "placing"])
def test_a_killed_build_leaves_nothing_that_loads(on_disk: Path, images: list[NDArray[np.uint16]], where: str) -> None:
    out, kept = on_disk / "out" / "a.urt", on_disk / "cache"
    process = started(where, on_disk, out=str(out), cache=str(kept))
    limit = time.monotonic() + 120
    while not (on_disk / "stopped").exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    assert (on_disk / "stopped").exists(), process.communicate()[1]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    for spec in on_disk.rglob("spec.json"):
        with pytest.raises(urt.EngineError):
            urt.load(spec.parent)
    assert where == "measuring" or list(out.parent.glob(".*.part")), "it was killed in the middle"
    urt.build(shipped_model(), samples=images, out=out, cache=kept, **OPTIONS).close()
    assert [path.name for path in out.parent.iterdir()] == ["a.urt"], "what the killed one left is gone"


def test_two_builds_of_one_key_do_not_harm_each_other(on_disk: Path) -> None:
    """Into one folder and one cache at once: both end well, and whoever was later found it done."""
    out, kept = on_disk / "a.urt", on_disk / "cache"
    both = [started("", on_disk, out=str(out), cache=str(kept)) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    urt.load(out).close()
    (place,) = kept.iterdir()
    urt.load(place).close()
    assert not list(on_disk.glob(".*.part"))
    assert read_folder(place).spec.options["asked"] == read_folder(out).spec.options["asked"]
