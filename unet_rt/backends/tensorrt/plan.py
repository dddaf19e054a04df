"""A plan on disk: what it was built by and for, what it takes, and the bytes that the library runs.

The file is one line of text that names the format, one line of JSON (the header), the plan as the library serialised it,
and the kernels that TensorRT-RTX compiled when the plan was first run (empty for TensorRT).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ...errors import BackendError, EngineError, size_text
from ...system.json import Count, Record, Size, from_json

_MAGIC = b"unet-rt plan 1\n"
_LONGEST_HEADER = 1 << 20


@dataclass(frozen=True)
class Profile:
    """Shapes that a plan takes: one tile at one batch size.

    Attributes:
        tile: Pixels per spatial axis.
        batch: Tiles per run.
        inputs: Shape of every input, in graph order.
    """

    tile: tuple[Count, ...]
    batch: Count
    inputs: tuple[tuple[Size, ...], ...]

    def __str__(self) -> str:
        return f"{size_text(self.tile)} px at batch {self.batch}"


@dataclass(frozen=True)
class Origin:
    """What a plan belongs to: it runs where all of this is the same.

    Attributes:
        library: ``tensorrt`` or ``tensorrt_rtx``.
        version: Of the library.
        gpu: Name of the GPU.
        compute_capability: As ``9.0``.
        driver: Version of the driver.
    """

    library: str
    version: str
    gpu: str
    compute_capability: str
    driver: str

    def differences(self, here: Origin) -> str:
        """What differs between a plan's origin and this machine, as text; ``""`` if nothing does."""
        names = {"compute_capability": "compute capability", "gpu": "GPU", "version": f"{here.library} version"}
        pairs = ((key, value, getattr(here, key)) for key, value in asdict(self).items())
        return ", ".join(f"{names.get(key, key)} {there}, here {now}" for key, there, now in pairs if there != now)


@dataclass(frozen=True)
class PlanHeader(Record):
    """What is known of a plan without running it.

    Attributes:
        origin: Library and machine.
        precision: What was asked, and found in the built engine.
        profiles: The shapes it takes, largest tile first.
        inputs: Names of the inputs in the graph's order.
        outputs: Names of the outputs, likewise.
        variant: Which form of the graph was the fastest.
        layers: How many convolutions were found in which precision, ``unread`` among them.
        measured_ms: Milliseconds of the first profile, per variant that was measured.
    """

    origin: Origin
    precision: str
    profiles: tuple[Profile, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    variant: str = "native"
    layers: Mapping[str, int] = field(default_factory=dict)
    measured_ms: Mapping[str, float] = field(default_factory=dict)

    def profile_of(self, shapes: Sequence[Sequence[int]]) -> int | None:
        """Index of the profile for inputs of these shapes, None if the plan does not take them."""
        wanted = tuple(tuple(shape) for shape in shapes)
        return next((k for k, profile in enumerate(self.profiles) if profile.inputs == wanted), None)

    def taken(self) -> str:
        """The shapes that the plan takes, for messages."""
        return ", ".join(map(str, self.profiles))


def write_plan(path: Path, header: PlanHeader, plan: bytes, kernels: bytes = b"") -> None:
    """Writes a plan with its header.

    Raises:
        BackendError: The file cannot be written.
    """
    document = {**header.to_json(), "plan_bytes": len(plan), "kernel_bytes": len(kernels)}
    try:
        with path.open("wb") as stream:
            stream.write(_MAGIC)
            stream.write(json.dumps(document).encode() + b"\n")
            stream.write(plan)
            stream.write(kernels)
    except OSError as error:
        raise BackendError(f"{path} cannot be written ({error.strerror}); choose another folder") from error


def read_header(path: Path) -> PlanHeader:
    """The header of a plan.

    Raises:
        EngineError: No such file, or not a plan.
    """
    return _read(path, whole=False)[0]


def read_plan(path: Path) -> tuple[PlanHeader, bytes, bytes]:
    """Header, plan, and compiled kernels.

    Raises:
        EngineError: No such file, not a plan, or a part of one.
    """
    return _read(path, whole=True)


def _read(path: Path, *, whole: bool) -> tuple[PlanHeader, bytes, bytes]:
    way_out = "build the engine again"
    try:
        with path.open("rb") as stream:
            if stream.readline(len(_MAGIC)) != _MAGIC:
                raise EngineError(f"{path} is not a plan of this version of unet-rt; {way_out}")
            document = json.loads(stream.readline(_LONGEST_HEADER))
            sizes = int(document.pop("plan_bytes")), int(document.pop("kernel_bytes"))
            header = from_json(
                PlanHeader,
                document,
                where=f"{path}: the header of the plan is damaged",
                error=EngineError,
                way_out=way_out,
            )
            plan, kernels = (stream.read(n) for n in sizes) if whole else (b"", b"")
    except OSError as error:
        raise EngineError(f"{path} cannot be read ({error.strerror}); {way_out}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{path}: the header of the plan is damaged ({error}); {way_out}") from error
    if whole and (len(plan), len(kernels)) != sizes:
        raise EngineError(f"{path} ends after {len(plan) + len(kernels)} of {sum(sizes)} bytes; {way_out}")
    return header, plan, kernels
