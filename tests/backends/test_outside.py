"""Backends that other packages offer: one that is installed runs the whole way; those that lie are refused candidates."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import unet_rt as urt
from unet_rt import backends
from unet_rt.backends import outside
from unet_rt.cli.demo import shipped_model
from unet_rt.drawing.microscopy import microscopy
from unet_rt.errors import BackendError
from unet_rt.system import facts

pytestmark = pytest.mark.onnxruntime
BUILT: Any = {"tile": (128, 128), "device": "cpu", "threads": 1}
EXAMPLE = Path(__file__).parents[2] / "examples" / "backend"

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
import unet_rt as urt
from unet_rt import backends
samples = np.load(sys.argv[1])
options = {"tile": (128, 128), "precision": "fp32", "threads": 1, "device": "cpu"}
reports = []
model, images = urt.shipped_model(), list(samples)
urt.build(model, samples=images, out=sys.argv[2], backend="own-kernel", report=reports.append, **options)
with urt.load(sys.argv[2]) as engine:
    mask = urt.predict(engine, samples[0])
verified = urt.verify(sys.argv[2], list(samples[:1]))
print(json.dumps({
    "names": backends.names(),
    "row": [c.backend for c in reports[0].candidates],
    "backend": engine.spec.backend, "version": engine.session_version, "accepted": verified.accepted,
    "set": float((mask > 0).mean()),
}))
"""


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    return [microscopy((224, 256), seed=seed, dtype=np.uint8).image for seed in range(2)]


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed")
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_an_installed_package_joins_build_parity_and_prediction(tmp_path: Path, pictures: list[Any]) -> None:
    source, target = tmp_path / "source", tmp_path / "site"
    shutil.copytree(EXAMPLE, source)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    np.save(tmp_path / "samples.npy", np.stack(pictures))
    package = Path(urt.__file__).parents[1]
    path = os.pathsep.join([str(target), str(package), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "samples.npy"), str(tmp_path / "own.urt")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["names"][-1] == "own-kernel"
    assert set(found["row"]) == {"own-kernel"}
    assert (found["backend"], found["version"], found["accepted"]) == ("own-kernel", "own-kernel 1.0", True)
    assert 0.05 < found["set"] < 0.6


class Honest:
    """ONNX Runtime under another name; what a liar changes of it comes as ``lies``."""

    def __init__(self, lies: dict[str, Any]) -> None:
        self.real: Any = backends.get("onnxruntime")
        self.lies = lies

    def missing(self, device: str = "cpu") -> Any:
        return self.lies.get("missing", self.real.missing)(device)

    def precisions(self, device: str = "cpu") -> Any:
        return self.lies.get("precisions", ("fp32",))

    def build(self, model: Path, graph: Path, **options: Any) -> Any:
        return self.lies.get("build", self.real.build)(model, graph, **options)

    def load(self, graph: Path, **options: Any) -> Any:
        session = self.real.load(graph, **{**options, "settings": None})
        return self.lies["session"](session) if "session" in self.lies else Posing(session, self.lies.get("run"))


class Posing:
    def __init__(self, session: Any, lie: Callable[[list[Any]], Any] | None = None, **told: Any) -> None:
        self._session, self._lie = session, lie or (lambda outputs: outputs)
        self.precision, self.device, self.version = "fp32", "cpu", "liar 1"
        self.__dict__.update(told)

    def run(self, inputs: Any) -> Any:
        return self._lie(self._session.run(inputs))

    def close(self) -> None:
        self._session.close()


def offer(monkeypatch: pytest.MonkeyPatch, *named: tuple[str, Any]) -> None:
    """Installed packages that offer backends under these names."""

    def entry(name: str, found: Any, k: int) -> Any:
        return SimpleNamespace(name=name, value="x:y", dist=SimpleNamespace(name=f"package-{k}"), load=lambda: found)

    entries = tuple(entry(name, found, k) for k, (name, found) in enumerate(named))
    monkeypatch.setattr(facts, "backend_entry_points", lambda: entries)
    outside.outside_names.cache_clear()
    outside.outside_backend.cache_clear()


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    outside.outside_names.cache_clear()
    outside.outside_backend.cache_clear()


def raising(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("the driver divides by nothing")


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "another number of outputs": ({"run": lambda y: y * 2}, "returned 2 outputs"),
    "outputs of another shape": ({"run": lambda y: [y[0][:, :, :-1]]}, r"returned output as .* the graph has"),
    "outputs of whole numbers": ({"run": lambda y: [y[0].astype(np.int32)]}, "an output of int32"),
    "no arrays": ({"run": lambda y: [y[0].tolist()]}, "not a list of arrays"),
    "wrong values": ({"run": lambda y: [-y[0]]}, "label|labels"),
    "values that are no numbers": ({"run": lambda y: [y[0] * np.float32(np.nan)]}, "label|labels"),
    "no graph": ({"build": lambda *_, **__: None}, "wrote no"),
    "settings that no file holds": (
        {"build": lambda model, graph, **_: (shutil.copyfile(model, graph), {"a": object()})[1]}, "no JSON"
    ),
    "another precision": ({"session": lambda s: Posing(s, precision="fp16")}, "loaded fp16 on cpu"),
    "another device": ({"session": lambda s: Posing(s, device="npu")}, "on npu"),
    "no version": ({"session": lambda s: Posing(s, version=None)}, "without version"),
    "an error of its own": ({"build": raising}, "ZeroDivisionError: the driver divides by nothing"),
    "an error when it runs": ({"run": raising}, "ZeroDivisionError: the driver divides by nothing"),
}  # fmt: skip


def test_backends_that_lie_are_refused_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: list[Any]
) -> None:
    """All of them beside one that does not: the engine is that one's, and the table says of each why."""
    named = {lie.replace(" ", "-"): (Honest(lies), said) for lie, (lies, said) in LIES.items()}
    offer(monkeypatch, *((name, liar) for name, (liar, _) in named.items()), ("honest", Honest({})))
    monkeypatch.setattr(backends, "_ENGINES", ())
    reports: list[Any] = []
    engine = tmp_path / "honest.urt"
    urt.build(shipped_model(), samples=pictures, out=engine, precision="fp32", report=reports.append, **BUILT)
    rows = reports[0].candidates
    assert {row.backend for row in rows} == {*named, "honest"}
    for row in rows:
        if row.backend != "honest":
            reasons = row.note or "; ".join(row.verdict.reasons if row.verdict is not None else ())
            assert row.verdict is None or not row.verdict.accepted, row
            assert re.search(named[row.backend][1], reasons), (row.backend, reasons)
    with urt.load(engine) as loaded:
        assert (loaded.spec.backend, loaded.session_version) == ("honest", "liar 1")
    offer(monkeypatch)  # the package is uninstalled
    with pytest.raises(BackendError, match="no backend 'honest'"):
        urt.load(engine)


def test_inputs_are_not_the_backend_s_to_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def scribbling(session: Any) -> Any:
        posing = Posing(session)
        posing.run = lambda inputs: inputs[0].fill(0)  # type: ignore[method-assign]
        return posing

    offer(monkeypatch, ("scribbler", Honest({"session": scribbling})))
    backend = backends.get("scribbler")
    backend.build(shipped_model(), tmp_path / "g.onnx", precision="fp32")
    x = np.ones((1, 1, 64, 64), np.float32)
    with backend.load(tmp_path / "g.onnx", precision="fp32") as session, pytest.raises(BackendError, match="read-only"):
        session.run([x])
    assert x.all()


def test_outputs_are_the_caller_s_though_the_backend_fills_one_buffer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = np.zeros((1, 2, 64, 64), np.float32)

    def keeping(outputs: list[Any]) -> list[Any]:
        kept[...] = outputs[0]
        return [kept[:]]

    offer(monkeypatch, ("keeper", Honest({"run": keeping})))
    backend = backends.get("keeper")
    backend.build(shipped_model(), tmp_path / "g.onnx", precision="fp32")
    with backend.load(tmp_path / "g.onnx", precision="fp32") as session:
        (first,) = session.run([np.zeros((1, 1, 64, 64), np.float32)])
        before = first.copy()
        session.run([np.ones((1, 1, 64, 64), np.float32)])
    assert not np.array_equal(kept, before)
    np.testing.assert_array_equal(first, before)


def test_packages_that_cannot_be_used_say_so(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    broken = SimpleNamespace(missing=lambda device: 7, precisions=raising, build=raising, load=raising)
    offer(
        monkeypatch, ("twice", Honest({})), ("twice", Honest({})), ("broken", broken), ("half", SimpleNamespace()),
        ("openvino", Honest({})), ("seven", Honest({"precisions": ("fp7",)})),
    )  # fmt: skip
    assert backends.names()[-4:] == ("broken", "half", "seven", "twice")
    assert "this package's own name" in caplog.text
    assert backends.get("openvino").__name__ == "unet_rt.backends.openvino"  # type: ignore[attr-defined]
    said = {name: backends.get(name).missing() for name in ("broken", "half", "seven", "twice")}
    assert "says 7 when asked what is missing" in said["broken"]
    assert "package-3 lacks missing and precisions and build and load" in said["half"]
    assert "package-0 and package-1 both offer a backend 'twice'" in said["twice"]
    assert "names the precisions ('fp7',)" in said["seven"]
    assert not {"broken", "half", "seven", "twice"} & set(backends.usable())
