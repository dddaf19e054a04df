"""The verb doctor: backends, devices, CPU, native modules on this machine, and what stands in the way."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import UnetRtError
from .options import add_verb
from .printing import print_json, text_stream


def add_doctor(verbs: Any) -> None:
    """The verb and its options, for the parser of the command line."""
    p = add_verb(verbs, "doctor", _doctor, "backends, versions, devices, CPU features")
    p.add_argument(
        "--prove",
        action="store_true",
        help="in at most ten minutes: kernels, engines of every backend and precision here, their parity and speed",
    )
    p.add_argument("--out", metavar="JSON", help="of --prove: the report, to keep and to send")
    p.add_argument("--device", default="auto", metavar="NAME", help="of --prove: auto, cpu, cuda[:N] or vulkan[:N]")
    p.add_argument("--only", metavar="SECTION", nargs="+", default=[], help="of --prove: these sections alone")
    p.add_argument("--seconds", type=float, default=590.0, metavar="S", help="of --prove: for everything")
    p.add_argument("--section", nargs=4, help=argparse.SUPPRESS)  # a process of --prove


def _doctor(args: argparse.Namespace) -> int:
    if args.section:
        return _run_section(*args.section)
    if args.prove:
        return _prove(args)
    report = collect()
    if args.json:
        print_json(report)
    else:
        print(format(report))
    return 0


def _run_section(name: str, device: str, work: str, limit: str) -> int:
    """A section of a proof, in a process of its own."""
    from ..judging.proof.prove import run_section

    return run_section(
        name, device, Path(work), float(limit), lambda text: print(f"[{name}] {text}", file=sys.stderr, flush=True)
    )


def _prove(args: argparse.Namespace) -> int:
    """Everything that this machine can show of itself; 1 where something disagrees."""
    from ..judging.proof.prove import prove
    from .proof import disagreements, proof_text

    report = prove(
        args.device,
        collect(),
        out=Path(args.out) if args.out else None,
        seconds=args.seconds,
        only=args.only,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if args.json:
        print_json(report)
    print(proof_text(report), file=text_stream(args))
    if args.out:
        print(f"{args.out} holds the report; docs/install.md says where to send it", file=text_stream(args))
    return 1 if disagreements(report) else 0


def collect() -> dict[str, Any]:
    """Facts as JSON values. A broken installation is a fact too: nothing is raised.

    Keys: ``unet_rt``, ``python``, ``os``, ``cpu`` (name, features, cores, threads), ``memory`` (bytes), ``devices``
    (GPUs, driver, why none, why unusable each, Vulkan's), ``backends`` (per name: version, precisions, why not per device),
    ``native`` (modules and why absent), ``versions`` (installed packages), ``conflicts`` (sentences), ``advice`` (what
    to do next, or None).
    """
    from .. import backends
    from ..system import facts

    record = facts.describe()
    cuda = facts.cuda()
    devices = ["cpu", *(f"cuda:{index}" for index in range(len(cuda.devices)))]
    vulkan = _vulkan_devices()
    found = {name: _backend(name, devices) for name in (*backends.names(), "eager")}
    found["ncnn"] = _backend("ncnn", ["cpu", *(f"vulkan:{index}" for index in range(len(vulkan)))])
    usable = [name for name in backends.names() if found[name]["missing"]["cpu"] is None]
    return {
        "unet_rt": __version__,
        "python": record["python"],
        "os": record["os"],
        "cpu": {
            "name": record["cpu"],
            "features": record["features"],
            "cores": record["cores"],
            "threads": record["threads"],
        },
        "memory": {"physical_bytes": record["memory_bytes"], "available_bytes": record["available_bytes"]},
        "devices": {
            "cuda": list(cuda.devices),
            "vulkan": vulkan,
            "driver": cuda.driver,
            "missing": cuda.missing,
            "unusable": {name: _unusable(index) for index, name in enumerate(devices[1:])},
        },
        "backends": found,
        "native": _native(),
        "versions": record["versions"],
        "conflicts": conflicts(),
        "advice": None if usable else f"no backend is usable; install one: {backends.install_line()}",
    }


def conflicts() -> list[str]:
    """Installed distributions that cannot live together, one sentence each."""
    from ..backends.onnxruntime import library as onnxruntime

    clash = onnxruntime.conflict()
    return [] if clash is None else [clash]


def _vulkan_devices() -> list[str]:
    """Name, kind and driver of every device that Vulkan lists; none where ncnn is not installed, or broken."""
    from .. import backends

    try:
        return [f"{one.name} ({one.kind}), driver {one.driver}" for one in backends.vulkan_devices()]
    except UnetRtError:  # said beside the backend
        return []


def _unusable(index: int) -> str | None:
    """Why images cannot be predicted on a GPU that the driver lists; None if they can."""
    from ..kernels import device

    try:
        return device.missing_reason(index)
    except UnetRtError as error:
        return str(error)


def _backend(name: str, devices: list[str]) -> dict[str, Any]:
    from .. import backends
    from ..system import facts

    backend = backends.get(name)
    outside = [facts.package_of(entry) for entry in facts.backend_entry_points() if entry.name == name]
    versions = (facts.package_version(package) for package in facts.DISTRIBUTIONS.get(name, outside))
    missing: dict[str, str | None] = {}
    precisions: dict[str, list[str]] = {}
    for device in devices:
        try:
            missing[device] = backend.missing(device)
            if missing[device] is None:
                precisions[device] = list(backend.precisions(device))
        except UnetRtError as error:
            missing[device] = f"broken: {error}"
    return {
        "version": next((version for version in versions if version is not None), None),
        "missing": missing,
        "precisions": precisions,
    }


def _native() -> dict[str, Any]:
    """State of the compiled modules: for each, whether it is there and why not."""
    from ..kernels import native as kernels

    try:
        cuda = kernels.cuda_status()
        from .. import _cpu

        cpu, compiler = None, str(_cpu.build_info["compiler"])
    except (UnetRtError, ImportError, AttributeError) as error:
        cpu, compiler, cuda = str(error), "", "unknown: the CPU module that records it cannot be loaded"
    import importlib.util

    if importlib.util.find_spec("unet_rt._cuda") is not None:
        state = None
    else:
        state = cuda
    return {"_cpu": {"missing": cpu, "compiler": compiler}, "_cuda": {"missing": state}}


def format(report: dict[str, Any]) -> str:
    """A report of :func:`collect` for people."""
    cpu, memory, devices = report["cpu"], report["memory"], report["devices"]
    lines = [
        ("unet-rt", f"{report['unet_rt']}, Python {report['python']}, {report['os']}"),
        ("CPU", f"{cpu['name']}, {cpu['threads']} of {cpu['cores']} threads usable"),
        ("", " ".join(cpu["features"]) or "no vector features known"),
        (
            "memory",
            f"{memory['available_bytes'] / 2**30:.1f} of {memory['physical_bytes'] / 2**30:.1f} GiB available",
        ),
    ]
    for index, name in enumerate(devices["cuda"]):
        lines.append(("GPU", f"cuda:{index} {name}, driver for CUDA {devices['driver']}"))
        if reason := devices["unusable"].get(f"cuda:{index}"):
            lines.append(("", f"not usable: {reason}"))
    if devices["missing"]:
        lines.append(("GPU", f"none: {devices['missing']}"))
    lines += [("GPU", f"vulkan:{index} {name}") for index, name in enumerate(devices["vulkan"])]
    for name, backend in report["backends"].items():
        for device, reason in backend["missing"].items():
            if reason is None:
                what = f"{backend['version']} on {device}: {', '.join(backend['precisions'][device])}"
            else:
                what = f"not on {device}: {reason}"
            lines.append((name, what))
    native = report["native"]
    lines.append(("_cpu", native["_cpu"]["missing"] or f"built with {native['_cpu']['compiler']}"))
    lines.append(("_cuda", "built" if native["_cuda"]["missing"] is None else f"absent: {native['_cuda']['missing']}"))
    lines.append(("packages", ", ".join(f"{name} {version}" for name, version in report["versions"].items())))
    lines.extend(("CONFLICT", sentence) for sentence in report["conflicts"])
    if report["advice"]:
        lines.append(("ADVICE", report["advice"]))
    return "\n".join(f"{head:<12} {text}".rstrip() for head, text in lines)
