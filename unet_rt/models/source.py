"""Where modules come from: checkpoints of this package, state dicts with an architecture, folders of nnU-Net.

Files are loaded as weights alone: nothing in them is executed. A user's own function that makes the module
(``package.module:function``) is, because the user names it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..contract.contract import Contract
from ..errors import ContractError, GraphError
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
        factory: ``package.module:function``, which makes the module, for a plain state dict of any other.
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
            "network of this package, --module package.module:function for your own"
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
    where, colon, name = factory.partition(":")
    if not colon:
        raise ContractError(f"module {factory!r} is not package.module:function; e.g. my_networks:make_unet")
    try:
        make: Any = importlib.import_module(where)
        for part in name.split("."):
            make = getattr(make, part)
    except (ImportError, AttributeError) as error:
        raise ContractError(f"{factory} cannot be imported ({error}); check the name and the Python path") from error
    made = make(**arguments)
    if not isinstance(made, nn.Module):
        raise ContractError(f"{factory} returns {type(made).__name__}, not a torch.nn.Module; name what makes one")
    return made
