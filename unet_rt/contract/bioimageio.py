"""bioimage.io packages: the resource description (``rdf.yaml``, format versions 0.4 and 0.5) as an input contract.

A package is a folder, a zip, or the ``rdf.yaml`` itself. The weights are those of the entry ``onnx``.

Steps of the preprocessing are composed into one normalisation ``(clip(x) - offset) / divisor``: ``scale_linear``,
``zero_mean_unit_variance`` (fixed or per sample), ``fixed_zero_mean_unit_variance``, ``scale_range``, ``clip`` before
and after them, ``ensure_dtype`` to a float. A step that this form cannot hold is an error that names it; none is skipped.

Statistics "per sample" are taken per plane (scope ``slice``): for a 2-D network each picture of a stack is a sample.
Where the step takes the channels of several together, they are taken over the whole image (scope ``image``).
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ContractError
from .contract import Contract, Normalization, OutputIs, Scope, Task
from .words import check_normalization

NAMES = ("rdf.yaml", "bioimageio.yaml", "model.yaml", "rdf.yml")
_LETTERS = {"batch": "N", "channel": "C", "b": "N", "c": "C", "z": "Z", "y": "Y", "x": "X", "t": "T", "time": "T"}
_UM = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6, "angstrom": 1e-4,
       "picometer": 1e-6, "inch": 25400.0}  # fmt: skip


def read_package(path: Path, work: Path | None, normalization: Normalization | None) -> tuple[Contract, Path]:
    """(contract, path of the ONNX weights).

    Args:
        path: Folder, zip or ``rdf.yaml``.
        work: Where weights are unpacked to from a zip; default: a folder that goes away with the process.
        normalization: Declared elsewhere: the preprocessing is not read, and cannot be at fault.

    Raises:
        ContractError: No package, no ONNX weights, another version, or a step that is not supported.
    """
    if not path.exists():
        raise ContractError(f"{path}: no such file or folder; check the path")
    if path.is_file() and zipfile.is_zipfile(path):
        return _read_zip(path, work, normalization)
    rdf = path
    if path.is_dir():
        found = [path / name for name in NAMES if (path / name).is_file()]
        if not found:
            raise ContractError(f"{path}: the folder holds no {NAMES[0]}; give the package or its description")
        rdf = found[0]
    description = _parse(rdf.read_bytes(), str(rdf))
    contract = describe(description, str(rdf), normalization)
    source, sha256 = _weights(description, str(rdf))
    weights = rdf.parent / source
    if not weights.is_file():
        raise ContractError(f"{rdf}: its weights {source} are not beside it; download the whole package")
    _check_hash(weights, sha256)
    return contract, weights


def _read_zip(path: Path, work: Path | None, normalization: Normalization | None) -> tuple[Contract, Path]:
    with zipfile.ZipFile(path) as package:
        members = {name: name for name in package.namelist()}
        # Archives of a folder have one level above the description.
        found = sorted((n for n in members if PurePosixPath(n).name in NAMES), key=lambda n: (n.count("/"), n))
        if not found:
            raise ContractError(f"{path}: the archive holds no {NAMES[0]}; it is not a bioimage.io package")
        description = _parse(package.read(found[0]), f"{path}:{found[0]}")
        contract = describe(description, str(path), normalization)
        source, sha256 = _weights(description, str(path))
        member = str(PurePosixPath(found[0]).parent / source)
        if member not in members:
            raise ContractError(f"{path}: its weights {source} are not in the archive; download the whole package")
        folder = work
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="unet-rt-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        # External data lies beside the weights; only base names are used, so nothing is written elsewhere.
        beside = PurePosixPath(member).parent
        for name in members:
            inside = PurePosixPath(name)
            if inside.parent == beside and (name == member or inside.suffix in (".data", ".bin", ".onnx_data")):
                try:
                    with package.open(name) as stream, (folder / inside.name).open("wb") as target:
                        shutil.copyfileobj(stream, target)
                except (zipfile.BadZipFile, EOFError) as error:
                    raise ContractError(f"{path}: {name} is damaged ({error}); download the package again") from error
    weights = folder / PurePosixPath(member).name
    _check_hash(weights, sha256)
    return contract, weights


def _parse(data: bytes, name: str) -> Mapping[str, Any]:
    import yaml

    try:
        description = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ContractError(f"{name}: not YAML ({error}); download it again") from error
    if not isinstance(description, Mapping) or "inputs" not in description:
        raise ContractError(f"{name}: no inputs are described; it is not the description of a bioimage.io model")
    return description


def _weights(description: Mapping[str, Any], name: str) -> tuple[str, str | None]:
    """(path of the ONNX weights relative to the description, their SHA-256 if stated)."""
    weights = description.get("weights") or {}
    entry = weights.get("onnx")
    if not isinstance(entry, Mapping):
        kinds = ", ".join(sorted(weights)) or "none"
        raise ContractError(f"{name}: the package has no ONNX weights (it has {kinds}); export them to ONNX first")
    source = entry.get("source")
    if isinstance(source, Mapping):
        source = source.get("source")
    if not isinstance(source, str) or not source:
        raise ContractError(f"{name}: the entry of the ONNX weights names no file; download the package again")
    if "://" in source:
        raise ContractError(f"{name}: its weights lie at {source}; download the package, nothing is fetched here")
    relative = PurePosixPath(source)
    if relative.is_absolute() or ".." in relative.parts:
        raise ContractError(f"{name}: its weights {source} lie outside the package; put them beside the description")
    sha256 = entry.get("sha256")
    return str(relative), str(sha256).lower() if sha256 else None


def _check_hash(path: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ContractError(
            f"{path}: SHA-256 {found[:12]}... is not the {sha256[:12]}... of the description; download the package "
            "again"
        )


# The description ---------------------------------------------------------------------------------------------------


def describe(description: Mapping[str, Any], name: str, normalization: Normalization | None = None) -> Contract:
    """The contract of a parsed description."""
    version = str(description.get("format_version", ""))
    if not version.startswith(("0.4.", "0.5.")):
        raise ContractError(
            f"{name}: format version {version or 'missing'} is not read; 0.4 and 0.5 are: update the description with "
            "the bioimage.io tools"
        )
    image = _first(description, "inputs", name)
    axes = _axes(image, name)
    contract = Contract(axes="".join(a.letter for a in axes))
    channel = next((a for a in axes if a.letter == "C"), None)
    space = [a for a in axes if a.letter in "ZYX"]
    if channel is not None and channel.names:
        contract = replace(contract, channels=channel.names)
    if all(a.size is not None for a in space):
        contract = replace(contract, trained_tile=tuple(a.size for a in space if a.size is not None))
    if space and all(a.um is not None for a in space):
        contract = replace(contract, pixel_size_um=tuple(a.um for a in space if a.um is not None))
    if normalization is None:
        count = channel.count if channel is not None else 1
        normalization = _compose(image.get("preprocessing") or [], axes, count, name)
    contract = replace(contract, normalization=normalization)
    return _with_output(contract, _first(description, "outputs", name), name)


def _first(description: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    tensors = description.get(key)
    if not isinstance(tensors, Sequence) or not tensors or not isinstance(tensors[0], Mapping):
        raise ContractError(f"{name}: {key} is not a list of tensors; it is not the description of a bioimage.io model")
    return tensors[0]


@dataclass(frozen=True)
class _Axis:
    """One axis of a described tensor. ``key`` is how steps refer to it."""

    key: str
    letter: str
    size: int | None = None
    names: tuple[str, ...] = ()
    count: int | None = None
    um: float | None = None


def _axes(tensor: Mapping[str, Any], name: str) -> list[_Axis]:
    described = tensor.get("axes")
    if isinstance(described, str):  # 0.4: "bcyx", with the sizes in "shape"
        shape = tensor.get("shape")
        sizes: list[Any] = [None] * len(described)
        if isinstance(shape, Sequence) and len(shape) == len(described):
            sizes = list(shape)
        elif isinstance(shape, Mapping) and "min" in shape and len(shape["min"]) == len(described):
            sizes = [low if step == 0 else None for low, step in zip(shape["min"], shape["step"], strict=True)]
        axes = []
        for letter, size in zip(described, sizes, strict=True):
            known = _letter(letter, name)
            fixed = int(size) if isinstance(size, (int, float)) and size else None
            axes.append(_Axis(letter, known, fixed, count=fixed if known == "C" else None))
        return axes
    if not isinstance(described, Sequence):
        raise ContractError(f"{name}: axes {described!r} are not readable; download the package again")
    return [_axis(axis, name) for axis in described]


def _axis(axis: Any, name: str) -> _Axis:
    if not isinstance(axis, Mapping):
        raise ContractError(f"{name}: axis {axis!r} is not readable; download the package again")
    kind = str(axis.get("type"))
    key = str(axis.get("id", {"space": "x", "batch": "batch"}.get(kind, kind)))
    if kind == "channel":
        names = tuple(str(n) for n in axis.get("channel_names") or ())
        return _Axis(key, "C", names=names, count=len(names) or None)
    letter = "N" if kind == "batch" else _letter(key, name)
    size = axis.get("size")
    um = None
    if letter in "ZYX" and axis.get("unit") in _UM:
        um = float(axis.get("scale", 1.0)) * _UM[str(axis["unit"])]
    return _Axis(key, letter, size if isinstance(size, int) else None, um=um)


def _letter(key: str, name: str) -> str:
    if key not in _LETTERS:
        raise ContractError(f"{name}: axis {key!r} is not supported; batch, channel, z, y and x are")
    return _LETTERS[key]


# Preprocessing -----------------------------------------------------------------------------------------------------


@dataclass
class _Chain:
    """Steps so far: ``y = (x - offset) / divisor`` per channel, or a statistic of that, after ``clip``."""

    offset: tuple[float, ...] = (0.0,)
    divisor: tuple[float, ...] = (1.0,)
    clip: tuple[float, float] | None = None
    clip_after: tuple[float, float] | None = None
    measured: Normalization | None = None
    plain: bool = True  # nothing but clips so far


def _compose(steps: Sequence[Any], axes: Sequence[_Axis], channels: int | None, name: str) -> Normalization:
    chain = _Chain()
    for step in steps:
        if not isinstance(step, Mapping):
            raise ContractError(f"{name}: preprocessing step {step!r} is not readable; download the package again")
        _add(chain, step, axes, channels, name)
    if chain.measured is not None:
        found = chain.measured
    elif chain.plain:
        found = Normalization("none")
    elif chain.offset == (0.0,) and len(chain.divisor) == 1 and chain.divisor[0] > 0:
        found = Normalization("scale", scale=chain.divisor[0])
    else:
        found = Normalization("fixed", mean=chain.offset, std=chain.divisor)
    return check_normalization(replace(found, clip=chain.clip, clip_after=chain.clip_after))


def _add(chain: _Chain, step: Mapping[str, Any], axes: Sequence[_Axis], channels: int | None, name: str) -> None:
    what = str(step.get("id") or step.get("name"))
    kwargs = dict(step.get("kwargs") or {})
    if what == "ensure_dtype":
        if not str(kwargs.get("dtype")).startswith("float"):
            raise _unsupported(name, what, f"dtype {kwargs.get('dtype')}: rounding to integers")
        return
    if chain.clip_after is not None:
        raise _unsupported(name, what, "after a clip of scaled values")
    if what == "clip":
        first = chain.plain and chain.measured is None
        if (first and chain.clip is not None) or None in (kwargs.get("min"), kwargs.get("max")):
            raise _unsupported(name, what, "unless it comes once before and once after the others, with min and max")
        ends = (float(kwargs["min"]), float(kwargs["max"]))
        if first:
            chain.clip = ends
        else:
            chain.clip_after = ends
    elif chain.measured is not None:
        raise _unsupported(name, what, f"after {chain.measured.method} statistics")
    elif what == "scale_linear":
        _per_channel_only(kwargs, axes, name, what)
        gain, offset = _tuple(kwargs.get("gain", 1.0)), _tuple(kwargs.get("offset", 0.0))
        if 0 in gain:
            raise _unsupported(name, what, "with gain 0")
        # gain * y + offset = (y - (-offset / gain)) / (1 / gain)
        _then(chain, [-o / g for g, o in _pairs(gain, offset)], [1 / g for g, _ in _pairs(gain, offset)])
    elif what == "fixed_zero_mean_unit_variance" or (
        what == "zero_mean_unit_variance"
        and kwargs.get("mode", "fixed" if "mean" in kwargs else "per_sample") == "fixed"
    ):
        _per_channel_only(kwargs, axes, name, what)
        mean, std = _tuple(kwargs.get("mean", 0.0)), _tuple(kwargs.get("std", 1.0))
        _then(chain, [m for m, _ in _pairs(mean, std)], [s for _, s in _pairs(mean, std)])
    elif what in ("zero_mean_unit_variance", "scale_range"):
        _measure(chain, what, kwargs, axes, channels, name)
    else:
        raise _unsupported(name, what, "")


def _measure(
    chain: _Chain, what: str, kwargs: Mapping[str, Any], axes: Sequence[_Axis], channels: int | None, name: str
) -> None:
    if kwargs.get("mode") == "per_dataset":
        raise _unsupported(name, what, "with mode per_dataset: statistics of a data set that is not here")
    if kwargs.get("reference_tensor") is not None:
        raise _unsupported(name, what, f"with reference_tensor {kwargs['reference_tensor']}")
    if len(chain.divisor) != 1 or chain.divisor[0] <= 0:
        raise _unsupported(name, what, "after a scaling per channel")
    scope = _scope(kwargs.get("axes"), axes, channels, name, what)
    # Statistics undo a linear step before them; only eps, in grey levels, feels its scale.
    eps = float(kwargs.get("eps", 1e-6)) * chain.divisor[0]
    if what == "zero_mean_unit_variance":
        chain.measured = Normalization("zscore", scope=scope, eps=eps)
        return
    low, high = float(kwargs.get("min_percentile", 0.0)), float(kwargs.get("max_percentile", 100.0))
    if (low, high) == (0.0, 100.0):
        chain.measured = Normalization("minmax", scope=scope, eps=eps)
    else:
        chain.measured = Normalization("percentile", scope=scope, percentiles=(low, high), eps=eps)


def _scope(kept: Any, axes: Sequence[_Axis], channels: int | None, name: str, what: str) -> Scope:
    """What statistics over the listed axes are in the words of the contract."""
    if kept is None:
        keys = {a.key for a in axes}
    else:
        keys = set(kept)  # a string of letters in 0.4, a list of names in 0.5
    known = {a.key: a.letter for a in axes}
    strange = keys - set(known)
    if strange:
        raise _unsupported(name, what, f"over axes {sorted(strange)}, which the tensor does not have")
    letters = {known[key] for key in keys}
    missing = [a.letter for a in axes if a.letter in "ZYX" and a.letter not in letters]
    if missing:
        raise _unsupported(name, what, f"over axes without {', '.join(missing)}")
    together = "C" in letters and channels != 1
    if together:
        return "image"
    return "channel" if "N" in letters else "slice"


def _per_channel_only(kwargs: Mapping[str, Any], axes: Sequence[_Axis], name: str, what: str) -> None:
    axis = kwargs.get("axis")
    if axis is not None and {a.key: a.letter for a in axes}.get(str(axis)) != "C":
        raise _unsupported(name, what, f"along axis {axis}")


def _then(chain: _Chain, offset: Sequence[float], divisor: Sequence[float]) -> None:
    """Adds ``(y - offset) / divisor`` to ``y = (x - o) / d``: ``(x - (o + d * offset)) / (d * divisor)``."""
    pairs = _pairs(_pairs(chain.offset, chain.divisor), _pairs(tuple(offset), tuple(divisor)))
    chain.offset = tuple(o + d * m for (o, d), (m, _) in pairs)
    chain.divisor = tuple(d * s for (_, d), (_, s) in pairs)
    chain.plain = False


def _tuple(value: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in value) if isinstance(value, (list, tuple)) else (float(value),)


def _pairs(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Both by channel, one number standing for all."""
    count = max(len(a), len(b))
    if len(a) not in (1, count) or len(b) not in (1, count):
        raise ContractError(f"steps for {len(a)} and {len(b)} channels follow each other; download the package again")
    return [(a[i if len(a) > 1 else 0], b[i if len(b) > 1 else 0]) for i in range(count)]


def _unsupported(name: str, what: str, how: str) -> ContractError:
    return ContractError(
        f"{name}: preprocessing {what}{' ' + how if how else ''} is not supported; declare what the network gets with "
        "--normalize"
    )


# Postprocessing ----------------------------------------------------------------------------------------------------


def _with_output(contract: Contract, tensor: Mapping[str, Any], name: str) -> Contract:
    channel = next((a for a in _axes_or_none(tensor) if a.letter == "C"), None)
    count = channel.count if channel is not None else 1
    task: Task | None = None
    output_is: OutputIs | None = None
    threshold: tuple[float, ...] = ()
    for step in tensor.get("postprocessing") or []:
        what = str(step.get("id") or step.get("name"))
        kwargs = step.get("kwargs") or {}
        if what == "sigmoid" and output_is is None:
            task, output_is = (None if count is None else "binary" if count == 1 else "multilabel"), "logits"
        elif what == "softmax" and output_is is None:
            task, output_is = "multiclass", "logits"
        elif what == "binarize" and not threshold:
            threshold = _tuple(kwargs.get("threshold", 0.5))
            output_is = output_is or "probabilities"
            task = task or (None if count is None else "binary" if count == 1 else "multilabel")
        elif what != "ensure_dtype":
            raise ContractError(
                f"{name}: postprocessing {what} is not supported; give the ONNX weights themselves, with --normalize "
                "and --task, and apply it to the raw output"
            )
    if any(not 0 <= t <= 1 for t in threshold):
        raise ContractError(
            f"{name}: binarize at {threshold} is not a probability; give the ONNX weights and --threshold"
        )
    classes = channel.names if channel is not None and len(channel.names) > 1 else ()
    return replace(contract, task=task, output_is=output_is, threshold=threshold, classes=classes)


def _axes_or_none(tensor: Mapping[str, Any]) -> list[_Axis]:
    """Axes of an output; one that cannot be read says nothing about the task."""
    try:
        return _axes(tensor, "output")
    except ContractError:
        return []


# bioimage.io -------------------------------------------------------------------------------------------------------


def contract_from_rdf(
    path: str | Path, work: Path | None = None, *, normalization: Normalization | None = None
) -> tuple[Contract, Path]:
    """(contract, path of the ONNX weights) of a bioimage.io package: see :mod:`unet_rt.bioimageio`."""

    return read_package(Path(path), work, normalization)
