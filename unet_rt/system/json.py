"""Records to and from JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def record_json(record: Mapping[str, Any]) -> str:
    """The record as it is written; non-finite numbers are not JSON and are written as text."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not np.isfinite(value):
            return str(value)
        return value

    return json.dumps(clean(record), indent=2, allow_nan=False) + "\n"
