"""Engine folders: seen whole or not at all, refused when damaged, foreign or unproven."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import unet_rt as urt
from unet_rt import backends
from unet_rt.engine.engine import Engine
from unet_rt.engine.folder import SCHEMA, read_folder, sha256, spec_key
from unet_rt.engine.spec import InputSpec, read_spec
from unet_rt.engine.write import write_folder
from unet_rt.system import facts as machine


@pytest.fixture
def folder(engine_folder, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(engine_folder, tmp_path / "copy.urt"))


def edit(folder: Path, change) -> None:
    """Changes spec.json and its key with it, as another version of this library would write it."""
    path = folder / "spec.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps({**document, "key": spec_key(document)}))


def rewrite(folder: Path, kind: str, change) -> None:
    """Changes a JSON file of the folder and lets spec.json name the new bytes, as a forger would."""
    document = json.loads((folder / "spec.json").read_text())
    path = folder / document["files"][kind]["name"]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    edit(folder, lambda d: d["files"][kind].update(sha256=sha256(path)))


def test_spec_survives_the_folder(engine_folder):
    opened = read_folder(engine_folder)
    again = read_spec(json.loads(json.dumps(opened.spec.to_json())), where="spec.json", way_out="build it again")
    assert again == opened.spec
    assert opened.spec.outputs[0].exact
    assert opened.spec.contract.classes == ("background", "nucleus")


def test_files_are_named_by_their_content(engine_folder):
    for kind, entry in read_folder(engine_folder).files.items():
        assert entry["name"].startswith(f"{kind}-{entry['sha256'][:12]}")
        assert sha256(engine_folder / entry["name"]) == entry["sha256"]


def test_the_fp32_graph_runs_in_plain_onnxruntime(engine_folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(read_folder(engine_folder).file("graph")))
    x = np.random.default_rng(0).normal(size=(1, 1, 64, 64)).astype(np.float32)
    assert session.run(None, {session.get_inputs()[0].name: x})[0].shape == (1, 2, 64, 64)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: (f / "spec.json").unlink(), "no spec.json"),
        (lambda f: (f / "spec.json").write_text("{"), "is damaged"),
        (lambda f: (f / "spec.json").write_text("[]"), "is damaged"),
        (lambda f: (f / "spec.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (lambda f: edit(f, lambda d: d.update(schema=[SCHEMA[0] + 1, 0])), "upgrade unet-rt"),
        (lambda f: edit(f, lambda d: d.pop("outputs")), "is damaged"),
        (
            lambda f: edit(f, lambda d: d.pop("tiles")),
            r"another version .*: unet-rt build model\.onnx --out .* --overwrite",
        ),
        (lambda f: edit(f, lambda d: d["options"].update(input_range=[0.0, 1.0])), "another version"),
        (lambda f: edit(f, lambda d: d.update(schema=[SCHEMA[0] - 1, 0])), r"unet-rt build .* --overwrite"),
        (lambda f: edit(f, lambda d: d["files"].pop("graph")), "names no graph"),
        (lambda f: next(f.glob("graph-*")).unlink(), "is missing"),
        (lambda f: next(f.glob("graph-*")).write_bytes(b"x"), "is not the file that was built"),
        (lambda f: next(f.glob("exam-*")).write_bytes(b""), "is not the file that was built"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, text):
    damage(folder)
    with pytest.raises(urt.EngineError, match=text):
        urt.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(halo="given", halo_limit=0),
        lambda d: d["contract"]["normalization"].update(scope="slice"),
        lambda d: d.pop("key"),
    ],
)
def test_a_spec_that_was_changed_by_hand_is_refused(folder, change):
    """The parity on record was measured with the halo and the normalisation that were built."""
    path = folder / "spec.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(urt.EngineError, match="key differs"):
        urt.load(folder)


def test_a_file_outside_the_folder_is_refused(folder):
    name = next(folder.glob("graph-*")).name
    edit(folder, lambda d: d["files"]["graph"].update(name=f"../{name}"))
    with pytest.raises(urt.EngineError, match="outside its folder"):
        urt.load(folder)


def test_files_are_synced_through_handles_that_windows_accepts(engine_folder, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    opened = read_folder(engine_folder)
    modes = []

    def note(handle):
        if stat.S_ISREG(os.fstat(handle).st_mode):  # folders are synced elsewhere alone
            modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(os, "fsync", note)
    write_folder(tmp_path / "x.urt", opened.spec, {"model": opened.file("model"), "graph": opened.file("graph")})
    assert modes
    assert os.O_RDONLY not in modes


def test_no_memory_left_means_the_smallest_tile(engine_folder):
    spec = read_folder(engine_folder).spec
    assert spec.grid((2000, 2000), max_px=0).computed_px > spec.grid((2000, 2000)).computed_px


def test_any_minor_schema_of_the_same_major_loads(folder):
    edit(folder, lambda d: d.update(schema=[SCHEMA[0], SCHEMA[1] + 7]))
    urt.load(folder).close()


@pytest.mark.parametrize(
    ("forge", "text"),
    [
        (lambda r: r.update(graph_sha256="0" * 64), "belongs to another graph"),
        (lambda r: r["verdict"].update(accepted=False), "misses its budget"),
        (lambda r: r["verdict"].update(label_change=0.5), "misses its budget"),
        (lambda r: r.pop("verdict"), "is damaged"),
    ],
)
def test_unproven_engines_are_refused(folder, forge, text):
    rewrite(folder, "parity", forge)
    with pytest.raises(urt.EngineError, match=text):
        urt.load(folder)
    urt.load(folder, accept_unverified=True).close()


def test_no_record_no_load(folder):
    edit(folder, lambda d: d["files"].pop("parity"))
    with pytest.raises(urt.EngineError, match="no record of parity"):
        urt.load(folder)


def test_on_another_machine_the_exam_is_sat_again(folder, monkeypatch):
    sat = []
    from unet_rt.engine import exam

    real = exam.sit
    monkeypatch.setattr(exam, "sit", lambda *args: sat.append(1) or real(*args))
    urt.load(folder).close()
    assert not sat
    monkeypatch.setattr(machine, "cpu_name", lambda: "another processor")
    urt.load(folder).close()
    assert sat


def test_a_passed_exam_is_kept_for_such_machines(folder, monkeypatch):
    """It is sat once per machine and graph; a row that was changed, or is another machine's, is worth nothing."""
    sat = []
    from unet_rt.engine import exam

    real = exam.sit
    monkeypatch.setattr(exam, "sit", lambda *args: sat.append(1) or real(*args))
    monkeypatch.setattr(machine, "cpu_name", lambda: "another processor")
    before = json.loads((folder / "spec.json").read_text())["key"]
    urt.load(folder).close()
    urt.load(folder).close()
    assert len(sat) == 1
    (row,) = folder.glob("row-*.json")
    assert json.loads((folder / "spec.json").read_text())["key"] == before, "it is no part of the engine"
    document = json.loads(row.read_text())
    for change in (
        {"graph_sha256": "0"},
        {"fingerprint": {**document["fingerprint"], "cpu": "a third"}},
        {"verdict": {**document["verdict"], "label_change": 0.5}},
        {"verdict": {**document["verdict"], "accepted": False}},
        {"verdict": {}},
    ):
        row.write_text(json.dumps({**document, **change}))
        sat.clear()
        urt.load(folder).close()
        assert sat, change
    row.write_text("{")
    urt.load(folder).close()
    monkeypatch.setattr(machine, "cpu_name", lambda: "a third processor")
    urt.load(folder).close()
    assert len(list(folder.glob("row-*.json"))) == 2
    opened = read_folder(folder)
    write_folder(folder, opened.spec, {kind: opened.file(kind) for kind in opened.files}, overwrite=True)
    assert not list(folder.glob("row-*.json"))


def test_a_failed_exam_is_refused(folder, monkeypatch):
    opened = read_folder(folder)
    arrays = opened.exam()
    arrays["output_0"] = arrays["output_0"][:, ::-1]  # classes exchanged: what a wrong build would give
    path = opened.file("exam")
    np.savez_compressed(path, **arrays)
    edit(folder, lambda d: d["files"]["exam"].update(sha256=sha256(path)))
    monkeypatch.setattr(machine, "cpu_name", lambda: "another processor")
    with pytest.raises(urt.ParityError, match="fails its exam"):
        urt.load(folder)


def test_another_device_is_refused(folder):
    with pytest.raises(urt.EngineError, match="built for cpu"):
        urt.load(folder, device="cuda:0")


def test_a_device_that_is_none_is_refused(engine_folder, tmp_path):
    """An engine for a GPU goes to another GPU, and nothing else is taken for its number."""
    opened = read_folder(engine_folder)
    files = {kind: opened.file(kind) for kind in opened.files}
    write_folder(tmp_path / "gpu.urt", replace(opened.spec, device="cuda:0"), files)
    with pytest.raises(urt.BackendError, match="no device 'gpu0'"):
        urt.load(tmp_path / "gpu.urt", device="gpu0")


def test_a_read_only_folder_loads(folder):
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        urt.load(folder).close()
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize("make", ["file", "other folder", "engine"])
def test_what_is_there_is_not_overwritten(tmp_path, engine_folder, make):
    target = tmp_path / "target.urt"
    if make == "file":
        target.write_text("mine")
    elif make == "other folder":
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    else:
        shutil.copytree(engine_folder, target)
    opened = read_folder(engine_folder)
    before = sorted(p.name for p in target.iterdir()) if target.is_dir() else target.read_text()
    with pytest.raises(urt.OutputError, match="choose another --out"):
        write_folder(target, opened.spec, {"model": opened.file("model"), "graph": opened.file("graph")})
    assert (sorted(p.name for p in target.iterdir()) if target.is_dir() else target.read_text()) == before


def test_replacing_leaves_one_engine_and_never_a_mixture(tmp_path, engine_folder):
    """A reader in another thread sees a loadable engine at every moment of twenty replacements."""
    opened = read_folder(engine_folder)
    target = tmp_path / "target.urt"
    other = tmp_path / "other.onnx"
    other.write_bytes(opened.file("model").read_bytes() + b"")
    files = {kind: opened.file(kind) for kind in opened.files}
    write_folder(target, opened.spec, files)
    done, errors = threading.Event(), []

    def reader() -> None:
        while not done.is_set():
            try:
                read_folder(target)
            except urt.EngineError as error:
                errors.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    for k in range(20):
        parity = tmp_path / "parity.json"
        parity.write_text(json.dumps({**opened.parity, "turn": k}))
        write_folder(target, opened.spec, {**files, "parity": parity}, overwrite=True)
    done.set()
    thread.join()
    assert not errors
    assert len(list(target.glob("parity-*"))) == 1
    assert not list(tmp_path.glob(".*.part"))


def test_builds_that_end_at_once_leave_a_whole_engine(tmp_path, engine_folder):
    """Four writers replace one engine by two kinds in turn; what the last one wrote is never deleted by another."""
    opened = read_folder(engine_folder)
    target = tmp_path / "target.urt"
    files = {kind: opened.file(kind) for kind in opened.files}
    kinds = []
    for k in range(2):
        parity = tmp_path / f"parity{k}.json"
        parity.write_text(json.dumps({**opened.parity, "turn": k}))
        kinds.append({**files, "parity": parity})
    write_folder(target, opened.spec, kinds[0])
    errors = []

    def writer(k: int) -> None:
        try:
            for turn in range(4):
                write_folder(target, opened.spec, kinds[(k + turn) % 2], overwrite=True)
        except urt.UnetRtError as error:
            errors.append(error)

    threads = [threading.Thread(target=writer, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    read_folder(target)
    assert len(list(target.glob("parity-*"))) == 1


def test_a_stale_plan_is_made_again_from_the_graph_as_built(tmp_path, engine_folder, monkeypatch, caplog):
    """Not from the FP32 model, which knows neither quantised ranges nor the layers that stay in FP32."""
    opened = read_folder(engine_folder)
    blob = tmp_path / "plan"
    blob.write_bytes(b"of another GPU")
    files = {kind: opened.file(kind) for kind in opened.files} | {"engine": blob}
    folder = write_folder(tmp_path / "planned.urt", opened.spec, files)
    real, built = backends.get(opened.spec.backend), []

    def build(model, graph, **options):
        built.append((model, options["tiles"], options["batches"]))
        real.build(model, graph, **options)

    fake = SimpleNamespace(stale=lambda blob, device: "it is another GPU's", build=build, load=real.load)
    monkeypatch.setattr(backends, "get", lambda name: fake)
    with urt.load(folder.path) as engine:
        assert built == [(folder.file("graph"), (engine.spec.tile,), (engine.spec.run_batch,))]
    assert "it is another GPU's" in caplog.text


def test_a_plan_that_is_made_again_is_proven_each_time(tmp_path, engine_folder, monkeypatch):
    """It need not come out as the one that passed the exam here before."""
    from unet_rt.engine import exam

    opened = read_folder(engine_folder)
    blob = tmp_path / "plan"
    blob.write_bytes(b"of another GPU")
    files = {kind: opened.file(kind) for kind in opened.files} | {"engine": blob}
    folder = write_folder(tmp_path / "planned.urt", opened.spec, files)
    real, sat, whole = backends.get(opened.spec.backend), list[int](), exam.sit
    fake = SimpleNamespace(stale=lambda blob, device: "it is another GPU's", build=real.build, load=real.load)
    monkeypatch.setattr(backends, "get", lambda name: fake)
    monkeypatch.setattr(exam, "sit", lambda *args: sat.append(1) or whole(*args))
    urt.load(folder.path).close()
    monkeypatch.setattr(machine, "cpu_name", lambda: "another processor")
    for _ in range(2):
        urt.load(folder.path).close()
    assert len(sat) == 3


class Doubler:
    """A session that returns what it gets, twice: (N, C, ...) in, two outputs out."""

    precision, device, version, threads = "fp32", "cpu", "none 0", 1

    def __init__(self) -> None:
        self.batches = []

    def run(self, inputs):
        self.batches.append([x.shape for x in inputs])
        return [np.concatenate(inputs, axis=1)] * 2

    def close(self) -> None:
        pass


def test_a_fixed_batch_is_padded_and_trimmed(engine_folder):
    from dataclasses import replace

    spec = read_folder(engine_folder).spec
    outputs = (replace(spec.outputs[0], channels=3),) * 2
    spec = replace(spec, batch=3, outputs=outputs, inputs=(InputSpec("a", "NCYX", 1), InputSpec("b", "NCYX", 2)))
    session = Doubler()
    x = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    for out in Engine(spec, session).run(x):
        np.testing.assert_array_equal(out, x)
    assert session.batches == [[(3, 1, 8, 8), (3, 2, 8, 8)]] * 3


def test_a_graph_without_batch_or_with_channels_last(engine_folder):
    from dataclasses import replace

    spec = read_folder(engine_folder).spec
    output = replace(spec.outputs[0], axes="NYXC", channels=3)
    spec = replace(spec, outputs=(output,), inputs=(InputSpec("a", "NYXC", 3),))

    class Last(Doubler):
        def run(self, inputs):
            assert inputs[0].shape == (2, 8, 6, 3)
            return [inputs[0] * 2]

    x = np.random.default_rng(0).normal(size=(2, 3, 8, 6)).astype(np.float32)
    np.testing.assert_array_equal(Engine(spec, Last()).run(x)[0], x * 2)


def test_a_graph_without_a_batch_axis_runs_tile_by_tile(engine_folder):
    from dataclasses import replace

    spec = read_folder(engine_folder).spec
    spec = replace(spec, outputs=(replace(spec.outputs[0], axes="CYX", channels=1),), inputs=(InputSpec("a", "YX", 1),))

    class Single(Doubler):
        def run(self, inputs):
            assert inputs[0].shape == (8, 6)
            return [inputs[0][None] * 2]

    x = np.random.default_rng(0).normal(size=(3, 1, 8, 6)).astype(np.float32)
    np.testing.assert_array_equal(Engine(spec, Single()).run(x)[0], x * 2)


def test_integer_inputs_get_no_values_that_were_cut(engine_folder):
    """Pixels scaled to 0 ... 1 for a network that takes uint8 would all be 0."""
    from dataclasses import replace

    from unet_rt.backends.session import Port, arrays_for

    spec = read_folder(engine_folder).spec
    spec = replace(spec, inputs=(InputSpec("a", "NCYX", 1, "uint8"),))

    class Checked(Doubler):
        def run(self, inputs):
            return arrays_for([Port("a", (None, 1, None, None), np.dtype("uint8"))], inputs)

    whole = np.arange(48, dtype=np.float32).reshape(1, 1, 8, 6)
    np.testing.assert_array_equal(Engine(spec, Checked()).run(whole)[0], whole)
    with pytest.raises(urt.BackendError, match="uint8 cannot hold"):
        Engine(spec, Checked()).run(whole / 255)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whose writes can be refused")
def test_an_unwritable_place_is_said_before_work(tmp_path, engine_folder):
    tmp_path.chmod(0o555)
    opened = read_folder(engine_folder)
    with pytest.raises(urt.OutputError, match="not writable"):
        write_folder(tmp_path / "x.urt", opened.spec, {"model": opened.file("model"), "graph": opened.file("graph")})


def test_a_halo_that_is_not_exact_keeps_the_tile_it_was_judged_with(engine_folder):
    from dataclasses import replace

    spec = replace(read_folder(engine_folder).spec, tile=(128, 128))
    exact = replace(spec, halo="exact", halo_limit=None).grid((700, 90))
    judged = replace(spec, halo="given", halo_limit=0).grid((700, 90))
    assert exact.tile[0] > 128 > exact.tile[1]
    assert judged.tile == (128, 96)


def test_replacing_an_engine_deletes_only_what_it_named(folder):
    (folder / "model-notes.txt").write_text("mine")
    opened = read_folder(folder)
    parity = folder.parent / "parity.json"
    parity.write_text(json.dumps({**opened.parity, "turn": 1}))
    files = {kind: folder.parent / f"{kind}.copy" for kind in opened.files}
    for kind, path in files.items():
        shutil.copyfile(opened.file(kind), path)
    write_folder(folder, opened.spec, {**files, "parity": parity}, overwrite=True)
    assert (folder / "model-notes.txt").read_text() == "mine"
    assert not opened.file("parity").exists()


FORK = """
import os, pickle, sys, threading, time
import numpy as np
import unet_rt as urt
image = np.load("image.npy")
engine = urt.load(sys.argv[1], threads=2)
wanted = urt.predict(engine, image)
try:
    pickle.dumps(engine)
except TypeError as error:
    assert "load it in each process" in str(error)
child = os.fork()
if not child:
    try:
        urt.predict(engine, image)
    except urt.BackendError as error:
        assert "load the engine in each process, after the fork" in str(error)
        engine = urt.load(sys.argv[1], threads=2)  # and the parent's is freed here, whose threads are not here
        os._exit(0 if np.array_equal(urt.predict(engine, image), wanted) else 3)
    os._exit(4)
end = time.monotonic() + 60
while not (done := os.waitpid(child, os.WNOHANG))[0]:
    if time.monotonic() > end:
        os.kill(child, 9)
        sys.exit("the child hangs")
    time.sleep(0.05)
assert np.array_equal(urt.predict(engine, image), wanted)
sys.exit(done[1] >> 8)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
def test_an_engine_stays_in_the_process_that_loaded_it(
    engine_folder: Path, sample_images: list[Any], tmp_path: Path
) -> None:
    """A forked child is told so, and may load its own; nothing is pickled. Neither the child nor its end may hang."""
    np.save(tmp_path / "image.npy", sample_images[0])
    paths = os.pathsep.join(str(Path(part).resolve()) for part in sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(engine_folder)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
