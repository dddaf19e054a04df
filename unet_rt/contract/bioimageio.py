"""bioimage.io packages: the resource description (``rdf.yaml``, format versions 0.4 and 0.5) as an input contract.

A package is a folder, a zip, or the ``rdf.yaml`` itself. The weights are those of the entry ``onnx``.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ContractError
from .contract import Contract, Normalization, OutputIs, Task
from .rdf_axes import Axis, axes_of
from .rdf_steps import compose, numbers_of

NAMES = ("rdf.yaml", "bioimageio.yaml", "model.yaml", "rdf.yml")


def contract_from_rdf(
    path: str | Path, work: Path | None = None, *, normalization: Normalization | None = None
) -> tuple[Contract, Path]:
    """(contract, path of the ONNX weights) of a bioimage.io package.

    Args:
        path: Folder, zip or ``rdf.yaml``.
        work: Where weights are unpacked to from a zip; default: a folder that goes away with the process.
        normalization: Declared elsewhere: the preprocessing is not read, and cannot be at fault.

    Raises:
        ContractError: No package, no ONNX weights, another version, or a step that is not supported.
    """
    path = Path(path)
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
    axes = axes_of(image, name)
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
        normalization = compose(image.get("preprocessing") or [], axes, count, name)
    contract = replace(contract, normalization=normalization)
    return _with_output(contract, _first(description, "outputs", name), name)


def _first(description: Mapping[str, Any], key: str, name: str) -> Mapping[str, Any]:
    tensors = description.get(key)
    if not isinstance(tensors, Sequence) or not tensors or not isinstance(tensors[0], Mapping):
        raise ContractError(f"{name}: {key} is not a list of tensors; it is not the description of a bioimage.io model")
    return tensors[0]


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
            threshold = numbers_of(kwargs.get("threshold", 0.5))
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


def _axes_or_none(tensor: Mapping[str, Any]) -> list[Axis]:
    """Axes of an output; one that cannot be read says nothing about the task."""
    try:
        return axes_of(tensor, "output")
    except ContractError:
        return []
