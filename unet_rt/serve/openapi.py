"""The service's description of itself, in the words of OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from .._version import __version__
from .job import MEDIA, Format

ERROR = {
    "description": "What is wrong, its value and the way out.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
BINARY = {"schema": {"type": "string", "format": "binary"}}
STATUS = ("400", "401", "403", "404", "405", "409", "413", "415", "422", "429", "500", "503", "504", "507")


def openapi(engines: Sequence[str]) -> dict[str, Any]:
    """The document, for the engines that there are."""
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": list(engines)}}
    answers = {"200": _result(), **dict.fromkeys(STATUS, ERROR)}
    predict = {
        "operationId": "predict",
        "summary": "An image in, its mask out",
        "parameters": [name, *_parameters()],
        "requestBody": {"content": dict.fromkeys((*list(MEDIA.values())[:3], "application/octet-stream"), BINARY)},
        "responses": answers,
        "security": [{}, {"token": []}],
    }
    paths: dict[str, Any] = {
        "/v1/predict/{name}": {"post": predict},
        "/v1/engines": {"get": _get("listEngines", "The engines, with their records")},
        "/health": {"get": _get("health", "Whether the service answers")},
        "/metrics": {"get": _get("metrics", "Counters for Prometheus", "text/plain")},
        "/v2": {"get": _get("server", "Open Inference Protocol: the server")},
        "/v2/models/{name}": {"get": {**_get("model", "Open Inference Protocol: the network"), "parameters": [name]}},
        "/v2/models/{name}/infer": {
            "post": {
                "operationId": "infer",
                "summary": "Open Inference Protocol: the raw network on tensors",
                "parameters": [name],
                "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
                "responses": {**_get("", "")["responses"], **dict.fromkeys(STATUS, ERROR)},
                "security": [{}, {"token": []}],
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "unet-rt", "version": __version__},
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["type", "message"],
                            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
                        }
                    },
                }
            },
        },
    }


def _result() -> dict[str, Any]:
    content: dict[str, Any] = {media: BINARY for media in list(MEDIA.values())[:3]}
    content["application/json"] = {"schema": {"type": "object"}}
    return {"description": "The result", "content": content}


def _get(operation: str, summary: str, media: str = "application/json") -> dict[str, Any]:
    good = {"description": summary or "The answer", "content": {media: {"schema": {}}}}
    return {
        "operationId": operation,
        "summary": summary,
        "responses": {"200": good, "401": ERROR, "403": ERROR, "404": ERROR},
        "security": [{}, {"token": []}],
    }


def _parameters() -> list[dict[str, Any]]:
    texts = {
        "format": (
            "of the answer; default: what Accept says, else png",
            {"type": "string", "enum": list(get_args(Format))},
        ),
        "output": ("default: a mask", {"type": "string", "enum": ["mask", "probability", "raw", "instances"]}),
        "head": ("which output of the network", {"type": "string"}),
        "axes": ("of the image, where the file does not say", {"type": "string"}),
        "channels": ("in the network's order", {"type": "string"}),
        "normalize": ("for engines whose contract declares none", {"type": "string"}),
        "mask_values": ("value of every label", {"type": "string", "pattern": "^[0-9]+(,[0-9]+)*$"}),
        "min_size": ("objects of fewer pixels are left out", {"type": "integer", "minimum": 1}),
        "reference": ("the image, below an allowed root, in place of a body", {"type": "string"}),
        "out": ("file or OME-Zarr to write below an allowed root", {"type": "string"}),
    }
    return [
        {"name": name, "in": "query", "required": False, "description": text, "schema": schema}
        for name, (text, schema) in texts.items()
    ]
