"""Engines by everything that decided them: whether one is what a build would make, and a folder that keeps them.

What decides an engine is the model (weights in files beside it included), its contract, the pixels of the samples and how
they are normalised, every option of ``build`` (budget, precision, tiles, halo, threads, time for the search), the code of
this package (passes, calibration and search among it), the versions of the libraries, and the machine (processor and its
features, or GPU and driver). Each is one hash, recorded in ``spec.json`` (``options.asked``), so that a build can say
which of them differs; all together are the key. What a measurement adds, the speed of the moment, is no part of it: two
builds of one key may choose different tiles, and either is what was asked.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.folder import EngineFolder, check_folder, read_folder, sha256
from ..engine.write import place_folder
from ..errors import EngineError, OutputError
from ..system import facts, limits

if TYPE_CHECKING:
    from ..baseline.samples import SampleWindow
    from ..contract.contract import Contract
    from .job import BuildOptions


log = logging.getLogger("unet_rt")
Digests = Mapping[str, str]  # of what decides about an engine, by part

_DESCRIBED = ("cpu", "features", "gpus", "versions")  # of a machine; memory and kernel versions decide nothing


def digest_request(options: BuildOptions, backends: Sequence[str], device: str) -> dict[str, str]:
    """The digests that are known before a model or an image is opened: of code, machine and options.

    Args:
        options: Of the build.
        backends: What is tried of them here, which is what ``auto`` comes to.
        device: Where it is tried.
    """
    decisive = {**asdict(options), "backend": list(backends), "threads": options.threads or limits.threads()}
    described = facts.describe()
    here = {name: described[name] for name in _DESCRIBED} | {"device": device}
    if facts.is_cuda(device):
        here["driver"] = facts.cuda().identity
    return {"code": _digest_code(), "machine": _hash(here), "options": _hash(decisive)}


def digest_inputs(model: Path, contract: Contract, samples: Sequence[SampleWindow]) -> dict[str, str]:
    """The digests of a model (whole, weights inside), its contract and the windows drawn from the samples."""
    windows = [
        {
            "name": s.name,
            "sha256": s.sha256,
            "dtype": str(s.pixels.dtype),
            "shape": s.pixels.shape,
            "start": s.start,
            "plane": s.plane,
            "offset": np.asarray(s.numbers.offset).tolist(),
            "divisor": np.asarray(s.numbers.divisor).tolist(),
            "clip": None if s.numbers.clip is None else np.asarray(s.numbers.clip).tolist(),
        }
        for s in samples
    ]
    return {"model": sha256(model), "contract": _hash(asdict(contract)), "samples": _hash(windows)}


def cache_key(digests: Digests) -> str:
    """One name for everything that decides about an engine."""
    return _hash(dict(digests))


def list_differences(folder: EngineFolder, digests: Digests) -> list[str]:
    """Which parts of what decides are not those that an engine was built from; all, where it does not say."""
    recorded = folder.spec.options.get("asked")
    if not isinstance(recorded, Mapping):
        return sorted(digests)
    return sorted(part for part, digest in digests.items() if recorded.get(part) != digest)


class EngineCache:
    """A folder of engines by key, shared by any number of processes; nothing in it is ever changed in place."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def get(self, digests: Digests) -> EngineFolder | None:
        """The engine that these decide about; None where there is none that is whole and says the same of itself."""
        place = self._place(digests)
        try:
            if not place.exists():
                return None
            found = read_folder(place)
        except (EngineError, OSError) as error:
            log.warning("the cached engine is of no use: %s", error)
            return None
        return None if list_differences(found, digests) else found

    def put(self, engine: EngineFolder, digests: Digests) -> None:
        """Keeps an engine; one of the same key stays, if it is whole, also one that another process puts there meanwhile.

        Raises:
            OutputError: The folder cannot be written.
            EngineError: The engine is not, or no longer, what its spec says.
        """
        place = self._place(digests)
        if self.get(digests) is not None:
            return
        try:
            copy_folder(engine, place, overwrite=place.exists())  # what is there and is not whole is replaced
        except OutputError:
            if self.get(digests) is None:
                raise

    def _place(self, digests: Digests) -> Path:
        return self.folder / f"{cache_key(digests)[:32]}.urt"


def copy_folder(engine: EngineFolder, folder: Path, *, overwrite: bool = False) -> EngineFolder:
    """A second folder of the same engine, whole or not at all.

    Raises:
        OutputError: As ``write_folder``.
        EngineError: The files are not what the engine's spec says: damaged, or replaced since it was read.
    """
    import shutil

    names = {"spec.json", *(str(entry["name"]) for entry in engine.files.values())}

    def fill(staging: Path) -> None:
        for name in sorted(names):
            try:
                shutil.copyfile(engine.path / name, staging / name)
            except FileNotFoundError as error:
                raise EngineError(f"{engine.path / name} has gone meanwhile; build the engine again") from error
        check_folder(staging, (staging / "spec.json").read_text(encoding="utf-8"), called=engine.path)

    return place_folder(folder, fill, overwrite=overwrite)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_without_numpy).encode()).hexdigest()


def _without_numpy(value: Any) -> Any:
    """Numbers of NumPy as those of Python, which is what they mean as an option."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{value!r} cannot be part of what is asked")


@cache
def _digest_code() -> str:
    """Hash of this package's files: a pass that was changed is another pass, whoever forgot to give it a number."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".so", ".pyd", ".ptx") and path.is_file():
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
