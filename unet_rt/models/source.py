"""Where modules come from: checkpoints of this package, state dicts with an architecture, folders of nnU-Net.

Files are loaded as weights alone: nothing in them is executed. A user's own function that makes the module
(``package.module:function``) is, because the user names it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..contract.contract import Contract
from ..errors import ContractError, GraphError, first_line
from .architecture import network_of
from .state import Opened, load_state


def open_module(
    path: Path,
    *,
    architecture: str | None = None,
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Opened:
    """The module of a checkpoint.

    Args:
        path: A checkpoint of ``unet-rt train``, a file with a state dict, or a ``fold_N`` folder of nnU-Net.
        architecture: One of this package's for a plain state dict: JSON, a JSON file, or ``network=UNet,width=32``.
        factory: ``package.module:function`` or ``file.py:function``, which makes the module, for a plain state dict of any
            other.
        arguments: Of ``factory``.

    Raises:
        GraphError: the file is not a checkpoint, or does not fit the architecture.
        ContractError: the architecture is not readable.
    """
    if architecture is not None and factory is not None:
        raise ContractError("an architecture and a function that makes the module are both named; give one of them")
    if path.is_dir():
        from .nnunet import open_nnunet

        return open_nnunet(path)
    from .checkpoint import load_checkpoint, read_torch

    content = read_torch(path)
    if architecture is None and factory is None:
        if isinstance(content, dict) and "architecture" in content and "contract" in content:
            network, contract, _ = load_checkpoint(path)
            return Opened(network, contract)
        raise GraphError(
            f"{path} holds weights without their architecture; name it: --architecture network=UNet,width=64 for a "
            "network of this package, --module my_networks.py:UNet for your own"
        )
    module: nn.Module
    if architecture is not None:
        module = network_of(parse_architecture(architecture))
    else:
        module = _call_factory(str(factory), arguments or {})
    load_state(module, content, path.name)
    return Opened(module.eval(), Contract())


def parse_architecture(text: str) -> dict[str, Any]:
    """JSON, the name of a JSON file, or ``network=UNet,width=32,padding=same``."""
    try:
        if text.lstrip().startswith("{"):
            values = json.loads(text)
        elif text.endswith(".json"):
            values = json.loads(Path(text).read_text(encoding="utf-8"))
        else:
            values = {}
            for part in text.split(","):
                key, equals, value = (piece.strip() for piece in part.partition("="))
                if not equals:
                    raise ContractError(f"architecture {part!r} is not KEY=VALUE, e.g. network=UNet,width=64")
                values[key] = _value(value)
    except OSError as error:
        raise ContractError(f"{text} cannot be read ({error.strerror or error}); check the path") from error
    except json.JSONDecodeError as error:
        raise ContractError(f"architecture {text[:80]!r} is not JSON ({error}); e.g. network=UNet,width=64") from error
    if not isinstance(values, dict):
        raise ContractError(f"architecture {text[:80]!r} is no set of values; e.g. network=UNet,width=64")
    nested = values.get("architecture")  # a whole record
    return nested if isinstance(nested, dict) else values


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _call_factory(factory: str, arguments: Mapping[str, Any]) -> nn.Module:
    """What ``package.module:function`` or ``file.py:function`` makes; modules are found in the working directory, too."""
    where, colon, name = factory.rpartition(":")
    if not (colon and where and name):
        raise ContractError(f"module {factory!r} is not MODULE:NAME; e.g. my_networks:make_unet or my_networks.py:UNet")
    path = Path(where) if where.endswith(".py") else None
    if path is not None and not path.is_file():
        raise ContractError(f"{path} does not exist; check the path of --module")
    with _importable(Path.cwd() if path is None else path.resolve().parent):
        try:
            make: Any = importlib.import_module(where) if path is None else _run_file(path)
            for part in name.split("."):
                make = getattr(make, part)
        except AttributeError as error:
            raise ContractError(f"{where} has no {name}; check the name after the colon") from error
        except ModuleNotFoundError as error:
            raise ContractError(
                f"{factory} cannot be imported ({error}); run it where the file is, or name the file: my_networks.py:{name}"
            ) from error
        except Exception as error:  # a user's code raises anything
            raise ContractError(f"{where} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
        try:
            made = make(**arguments)
        except Exception as error:  # as above
            raise ContractError(
                f"{factory} fails when it is called ({type(error).__name__}: {first_line(error)}); pass what it takes with "
                "--arguments, e.g. '{\"classes\": 3}'"
            ) from error
    if not isinstance(made, nn.Module):
        raise ContractError(f"{factory} returns {type(made).__name__}, not a torch.nn.Module; name what makes one")
    return made


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules of a folder can be imported meanwhile, as they can by a script that lies in it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's code took it away itself
            sys.path.remove(str(folder))


def _run_file(path: Path) -> ModuleType:
    """The module of a file; under a name of its own, so that a ``torch.py`` does not take the place of another."""
    name = f"{path.stem} of unet_rt --module"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
