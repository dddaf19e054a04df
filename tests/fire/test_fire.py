"""Hostile files and faults, as many as CI has time for; `make fire` sends more. What broke once is run first."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

pytestmark = [
    pytest.mark.onnxruntime,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and measures processes by /proc"),
]
sys.path[:0] = [str(Path(__file__).parent)]
for _name in ("tifffile", "zarr"):
    pytest.importorskip(_name)

import unet_rt as urt
from unet_rt.errors import ContractError, EngineError, ImageError, OutputError

arena = pytest.importorskip("arena")
fire = pytest.importorskip("fire")
hostile_graphs = pytest.importorskip("hostile_graphs")
mutators = pytest.importorskip("mutators")

FEW = int(os.environ.get("UNET_RT_FIRE", "12"))  # files per kind
FOUND = json.loads(Path(__file__).with_name("found.json").read_text())


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory, engine_folder: Path) -> Iterator[object]:
    with arena.Arena(tmp_path_factory.mktemp("arena")) as place:
        yield fire.Fire(place, engine_folder)


@pytest.mark.parametrize("name", hostile_graphs.GRAPHS)
def test_small_graphs_of_large_numbers_are_answered_at_once(name: str, attack: object) -> None:
    build, code, said = hostile_graphs.GRAPHS[name]
    place = attack.arena
    (place.clear() / "m.onnx").write_bytes(build().SerializeToString())
    outcome = place.run(["inspect", "m.onnx"])
    assert place.faults(outcome, seconds=2.0) == [], outcome.err
    assert outcome.code == code, outcome.err
    assert said in outcome.out + outcome.err


@pytest.mark.parametrize("case", FOUND, ids=lambda case: f"{case['kind']} {case['seed']}")
def test_what_broke_once_holds(case: dict[str, object], attack: object) -> None:
    outcome, faults = attack.run(case["kind"], case["seed"])
    assert faults == [], outcome.err
    assert outcome.code == case["code"], outcome.err


@pytest.mark.parametrize("kind", mutators.KINDS)
def test_hostile_files_get_an_answer(kind: str, attack: object) -> None:
    failed = []
    for seed in range(FEW):
        outcome, faults = attack.run(kind, seed)
        failed += [(seed, faults, outcome.err)] if faults else []
    assert failed == []


def test_the_arena_sees_what_breaks_the_promise(attack: object) -> None:
    """A watch that cannot bark is none."""
    place = attack.arena
    place.clear()
    good = dict(code=2, out="", err="unet-rt: no\n", left=(), seconds=0.1, peak_mb=100.0)
    assert place.faults(arena.Outcome(**good)) == []
    for change, fault in (
        ({"code": None, "death": "died (-11)"}, "died"),
        ({"err": "Traceback\n x\n"}, "2 lines"),
        ({"err": "unet-rt: internal error\n"}, "internal error"),
        ({"err": "unet-rt: \x1b[31m\n"}, "unprintable"),
        ({"seconds": 99.0}, "took 99"),
        ({"peak_mb": 9e3}, "took 9000 MB"),
        ({"left": ("case/.a.part",)}, "left case/.a.part"),
    ):
        assert any(fault in found for found in place.faults(arena.Outcome(**{**good, **change}))), fault
    place.secret.read_bytes()
    if place._atime_works():
        assert place.faults(arena.Outcome(**good)) == ["read what lies outside"]


def test_killed_and_interrupted_writers(engine_folder: Path, tmp_path: Path) -> None:
    """In a process of its own, which forks."""
    import subprocess

    script = Path(__file__).with_name("faults.py")
    command = [sys.executable, str(script), "--engine", str(engine_folder), "--only", "kills", "--kills", "10"]
    record = tmp_path / "faults.json"
    done = subprocess.run([*command, "--record", str(record)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sum(json.loads(record.read_text())["tried"].get(f"SIG{s}", 0) for s in ("KILL", "TERM", "INT")) >= 10


# --- what no file says ------------------------------------------------------------------------------------------------


def test_calls_that_mean_nothing_are_refused_by_name(engine_folder: Path, tmp_path: Path) -> None:
    image = mutators.pixels()
    with urt.load(engine_folder) as engine:
        for error, said, options in (
            (ContractError, r"tile is \(64\.0, 64\.0\); use whole numbers", {"tile": (64.0, 64.0)}),
            (ContractError, r"batch is 1\.5; use whole numbers", {"batch": 1.5}),
            (OutputError, "no file name has", {"out": tmp_path / "a\0.tif"}),
            (ImageError, "no file name has", {"region": "a\0.tif"}),
        ):
            with pytest.raises(error, match=said):
                urt.predict(engine, image, **options)
        for scale in (1e300, 1e36):  # beyond float32, the one within it and the other not
            with pytest.raises(ImageError, match="as float32"):
                urt.predict(engine, image.astype(np.float64) * scale)
    with pytest.raises(EngineError, match="no file name has"):
        urt.load("a\0.urt")


def test_an_engine_that_is_pickled_is_loaded_by_its_path(engine_folder: Path) -> None:
    import pickle

    image = mutators.pixels()
    with urt.load(engine_folder) as engine, pickle.loads(pickle.dumps(engine)) as again:
        assert again.spec == engine.spec
        np.testing.assert_array_equal(urt.predict(again, image), urt.predict(engine, image))


def test_what_no_disk_holds_is_refused_before_it_is_planned(attack: object) -> None:
    import zarr

    place = attack.arena
    folder = place.clear()
    zarr.create_array(folder / "i.zarr", shape=(10**7, 10**7), dtype="u2", chunks=(512, 512), zarr_format=2)
    path = folder / "i.zarr" / ".zarray"
    for side, out, said in ((10**7, "m.npy", "needs 100000.00 GB"), (10**9, "m.zarr", "1000000000 px cannot be tiled")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": [side, side]}))
        outcome = place.run(["predict", attack.engine, "i.zarr", "--out", out])
        assert place.faults(outcome, seconds=2.0) == []
        assert said in outcome.err


# --- servers ----------------------------------------------------------------------------------------------------------


class Hostile(BaseHTTPRequestHandler):
    """Answers by the first part of the path."""

    protocol_version = "HTTP/1.0"
    waiting = threading.Event()

    def do_GET(self) -> None:
        what = self.path.split("/")[1]
        if what == "stall":
            self.waiting.wait(20)
        elif what.isdigit():
            self.send_error(int(what))
        elif what == "garbage":
            self.wfile.write(b"\x00\xff\x1b[31m\r\n\r\n")
        else:
            self.send_response(302)
            self.send_header("Location", self.path if what == "loop" else "file:///etc/hostname")
            self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


def test_servers_that_do_not_answer_are_told_apart(attack: object) -> None:
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = attack.arena

    def said_of(what: str) -> str:
        place.clear()
        url = f"http://127.0.0.1:{server.server_port}/{what}/a.tif"
        outcome = place.run(["predict", attack.engine, url, "--out", "m.npy"])
        assert (outcome.code, place.faults(outcome)) == (2, []), outcome.err
        return str(outcome.err)

    try:
        for what, said in (
            ("404", "no such file"),
            ("500", "answers 500"),
            ("403", "answers 403"),
            ("loop", "redirects in a loop"),
            ("file", "to an address of another kind"),
            ("garbage", "does not speak HTTP"),
            ("stall", "nothing came for 1 s"),
        ):
            assert said in said_of(what)
    finally:
        Hostile.waiting.set()
        server.shutdown()
        server.server_close()
    assert "the connection is refused" in said_of("nobody")


def test_seeds_are_the_same_everywhere() -> None:
    """A failure is a kind and a seed: they mean the same file to everybody."""
    assert mutators.draw_of("tiff", 3).random() == mutators.draw_of("tiff", 3).random()
    assert mutators.draw_of("tiff", 3).random() != mutators.draw_of("tiff", 4).random()
    assert isinstance(mutators.draw_of("tiff", 3), random.Random)
