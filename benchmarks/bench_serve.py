"""The service under load, against ``predict`` in a loop on the same images.

    python benchmarks/bench_serve.py [--requests 200] [--clients 16] [--workers 2] [--largest 4096]

Of all requests every tenth leaves before its answer, and every tenth is hostile (a bomb, a cut file, no image). Every other
answer is compared with the mask of ``predict``, bit by bit. Latency is that of the whole mixture, sent by all at once,
waiting included. Both sides read and write npy files, and warm up first; ``small`` are the images below a tile, by
themselves. Exit status 1 where a mask is wrong or an answer is lost.
"""

from __future__ import annotations

import http.client
import io
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import record

import unet_rt as urt
from unet_rt.drawing.microscopy import microscopy
from unet_rt.system import limits

SIDES = (64, 100, 128, 200, 256, 333, 512, 512, 700, 1024)
HOSTILE = (
    b"GIF89a",
    b"\x93NUMPY\x01\x00\xff\xffcut",
    b"",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\0\0\0\0",
)


def main(argv: list[str] | None = None) -> int:
    parser = record.parser(__doc__, seconds=60)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--workers", type=int, default=limits.threads())
    parser.add_argument("--largest", type=int, default=4096)
    args = parser.parse_args(argv)
    if args.quick:
        args.requests, args.largest = 20, 512
    with tempfile.TemporaryDirectory() as text:
        return measure(args, Path(text))


def measure(args, folder: Path) -> int:
    drawn = [microscopy((512, 512), seed=seed).image for seed in range(4)]
    sides = [min(SIDES[k % len(SIDES)], args.largest) for k in range(args.requests)]
    for k, side in ((3, args.largest), (args.requests // 2, args.largest // 2), (args.requests - 4, args.largest // 2)):
        sides[k] = max(side, 64)
    images = [np.tile(drawn[k % 4], (-(-n // 512),) * 2)[:n, :n] for k, n in enumerate(sides)]
    bodies = [npy(image) for image in images]
    engine = folder / "nuclei.urt"
    urt.build(urt.shipped_model(), samples=drawn[:2], out=engine, backend="onnxruntime", precision="fp32").close()

    def asked(k: int) -> str:
        return "hostile" if k % 10 == 5 else "leaves" if k % 10 == 7 else "stays"

    stay = [k for k in range(args.requests) if asked(k) == "stays"]
    with urt.load(engine) as loaded:
        side = loaded.spec.tile[0]
        masks, loop_s = loop(loaded, bodies, stay, folder)
        small = [k for k in stay if sides[k] < side][:100]
        _, loop_small_s = loop(loaded, bodies, small, folder)
    command = [sys.executable, "-m", "unet_rt", "serve", str(engine), "--port", "0", "--json"]
    process = subprocess.Popen([*command, "--workers", str(args.workers)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        said = ""
        while not said.endswith("}\n"):
            said += next(lines)
        address = urlsplit(json.loads(said)["url"]).netloc

        def ask(k: int, kind: str) -> tuple[float, str]:
            begun = time.perf_counter()
            body = HOSTILE[k // 10 % len(HOSTILE)] if kind == "hostile" else bodies[k]
            connection = http.client.HTTPConnection(address, timeout=0.05 if kind == "leaves" else 600)
            try:
                connection.request("POST", "/v1/predict/nuclei?format=npy", body)
                reply = connection.getresponse()
                status, data = reply.status, reply.read()
            except OSError:
                return time.perf_counter() - begun, "left" if kind == "leaves" else "lost"
            finally:
                connection.close()
            if kind == "hostile":
                return time.perf_counter() - begun, "refused" if 400 <= status < 500 else f"hostile: {status}"
            right = (
                status == 200 and np.array_equal(np.load(io.BytesIO(data)), masks[k]) if k in masks else status == 200
            )
            return time.perf_counter() - begun, "right" if right else f"wrong: {status}"

        def run(which: list[int], mixed: bool = True) -> tuple[float, list[tuple[float, str]]]:
            begun = time.perf_counter()
            with ThreadPoolExecutor(args.clients) as clients:
                done = list(clients.map(lambda k: ask(k, asked(k) if mixed else "stays"), which))
            return time.perf_counter() - begun, done

        run(small[: 2 * args.workers], mixed=False)
        small_s, small_done = run(small, mixed=False)
        before = tree_bytes(process.pid)
        service_s, done = run(list(range(args.requests)))
        first = tree_bytes(process.pid)
        run(small, mixed=False)
        after = tree_bytes(process.pid)
    finally:
        process.terminate()
        process.wait(30)
    kinds = {kind: sum(k == kind for _, k in done + small_done) for _, kind in done + small_done}
    seconds = np.array([s for s, kind in done if kind == "right"])
    mpx = sum(images[k].size for k in stay) / 1e6
    print(
        f"{args.requests} requests, {args.clients} clients, {args.workers} workers, {limits.threads()} threads: {kinds}"
    )
    print(f"latency p50 {np.percentile(seconds, 50):.3f} s, p99 {np.percentile(seconds, 99):.3f} s")
    print(f"service {mpx / service_s:.2f} Mpx/s, predict in a loop {mpx / loop_s:.2f} Mpx/s: {loop_s / service_s:.3f}")
    print(f"small ({len(small)} below {side} px): {len(small) / small_s:.1f} / s, loop {len(small) / loop_small_s:.1f} / s: "
          f"{loop_small_s / small_s:.3f}")  # fmt: skip
    print(
        f"memory {before / 1e6:.0f} MB, {first / 1e6:.0f} after the mixture, {after / 1e6:.0f} after {len(small)} more"
    )
    return int(any(kind not in ("right", "left", "refused") for kind in kinds))


def npy(image) -> bytes:
    stream = io.BytesIO()
    np.save(stream, image)
    return stream.getvalue()


def loop(engine, bodies: list[bytes], which: list[int], folder: Path) -> tuple[dict[int, np.ndarray], float]:
    """(masks, seconds) of ``predict`` from file to file, one image after the other."""
    for k in which:
        (folder / f"{k}.npy").write_bytes(bodies[k])
    urt.predict(engine, folder / f"{which[0]}.npy", out=folder / "mask.npy", overwrite=True)
    masks, spent = {}, 0.0
    for k in which:
        begun = time.perf_counter()
        urt.predict(engine, folder / f"{k}.npy", out=folder / "mask.npy", overwrite=True)
        spent += time.perf_counter() - begun
        masks[k] = np.load(folder / "mask.npy")
    return masks, spent


def tree_bytes(pid: int) -> int:
    """Resident memory of a process and its children (Linux)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 + sum(tree_bytes(int(child)) for child in children)


if __name__ == "__main__":
    sys.exit(main())
