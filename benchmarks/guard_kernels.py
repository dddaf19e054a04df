"""A guard against regressions that noise cannot fool: instructions of the kernels, counted by valgrind.

    python benchmarks/guard_kernels.py            # counts, compares with results/instructions.json; exit status 1 if more
    python benchmarks/guard_kernels.py --write    # counts, and writes that record anew

Each kernel runs below ``valgrind --tool=callgrind`` with one thread on one tile, after a run that is not counted; the
instructions of the second, its Python wrapper included, are divided by the pixels. They do not depend on load, clock or
caches, and hardly on the machine: valgrind 3.19 shows programs a processor with AVX2 and no more. They do depend on the
compiler, so the bound is generous: 1.5 times the record. A loop that lost its vectors costs several times.

Counting is switched on and off from within, by valgrind's client requests; only x86-64 has these instructions here.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "instructions.json"
BOUND = 1.5  # times the recorded instructions
SIDE = 512  # px: a call's own costs, some ten thousand instructions, are little beside 262,144 px

# VG_USERREQ__ZERO_STATS and its like, from valgrind's callgrind.h: 'C' and 'T' in the upper bytes.
DUMP, ZERO, START, STOP = (0x4354_0000 + k for k in (0, 1, 4, 5))
# mov rax, rdi; xor edx, edx; then rol rdi by 3, 13, 61, 51 (which is by 128, nothing) and xchg rbx, rbx: what valgrind
# takes for a request whose arguments lie at rax; mov rax, rdx; ret. Elsewhere it does nothing.
REQUEST = bytes.fromhex("4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0 c3")


def missing() -> str | None:
    """Why instructions cannot be counted here, None if they can."""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return f"client requests are written for x86-64 Linux, not {platform.machine()} {sys.platform}"
    if shutil.which("valgrind") is None:
        return "valgrind is not installed (apt-get install valgrind)"
    return None


def cases() -> list[tuple[str, int, Callable[[], Any]]]:
    """(name, pixels, kernel call) with one thread."""
    sys.path[:0] = [str(Path(__file__).resolve().parent)]
    import bench_kernels

    found = [
        *bench_kernels.gather_cases(SIDE, 1),
        *bench_kernels.stitch_cases(SIDE, 1),
        *bench_kernels.other_cases(SIDE, 1),
    ]
    return [(name, SIDE * SIDE, call) for name, _, call, _ in found]


def run_cases() -> None:
    """Below valgrind: every kernel once to warm up, once counted; its name goes to stdout, its count to a dump."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(REQUEST)
    call = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64))(
        ctypes.addressof(ctypes.c_char.from_buffer(page))
    )
    requests = {code: (ctypes.c_uint64 * 6)(code) for code in (DUMP, ZERO, START, STOP)}
    for name, pixels, kernel in cases():
        kernel()
        call(requests[START])
        call(requests[ZERO])
        kernel()
        call(requests[DUMP])
        call(requests[STOP])
        print(json.dumps([name, pixels]), flush=True)


def count() -> dict[str, float]:
    """Instructions per pixel of every kernel."""
    with tempfile.TemporaryDirectory(prefix="unet-rt-guard-") as folder:
        tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        done = subprocess.run([*tool, sys.executable, __file__, "--run"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"valgrind failed:\n{done.stderr[-2000:]}")
        named = [json.loads(line) for line in done.stdout.splitlines()]
        dumps = sorted(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))[: len(named)]
        totals = [int(re.search(r"^(?:summary|totals): (\d+)", path.read_text(), re.MULTILINE)[1]) for path in dumps]  # type: ignore[index]
    if len(totals) != len(named) or min(totals, default=0) == 0:
        raise SystemExit(f"valgrind counted {totals} for {len(named)} kernels")
    return {name: total / pixels for (name, pixels), total in zip(named, totals, strict=True)}


def above(found: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """A sentence for every kernel that needs more instructions than the bound."""
    return [
        f"{name}: {value:.2f} instructions per pixel, {value / recorded[name]:.2f} times the recorded {recorded[name]:.2f}; "
        f"the bound is {BOUND}"
        for name, value in found.items()
        if name in recorded and value > BOUND * recorded[name]
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the record")
    parser.add_argument("--run", action="store_true", help="used by the script itself")
    args = parser.parse_args(argv)
    if args.run:
        run_cases()
        return 0
    reason = missing()
    if reason is not None:
        print(f"not counted: {reason}")
        return 0
    found = count()
    for name, value in found.items():
        print(f"  {name:44s} {value:7.2f} instructions per pixel")
    if args.write:
        import record

        print(record.write("instructions", {"side": SIDE, "bound": BOUND, "per_pixel": found}, RESULTS))
        return 0
    wrong = above(found, json.loads(RESULTS.read_text())["per_pixel"])
    for text in wrong:
        print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
