"""Engines that a server runs, e.g. Triton: see :mod:`unet_rt.engine.remote`, whose names these are."""

from __future__ import annotations

from .engine.remote import RemoteSession, connect

__all__ = ["RemoteSession", "connect"]
