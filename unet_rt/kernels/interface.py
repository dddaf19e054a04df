"""Where the C interface lies, for compilers and for CMake."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def get_include() -> str:
    """The folder of ``unet_rt.h``, the C interface of the kernels, for a compiler's ``-I``.

    The library, ``libunet_rt`` (``unet_rt.dll``), lies in the folder above.
    """
    return str(_PACKAGE / "include")


def get_cmake_dir() -> str:
    """The folder for CMake's ``-Dunet_rt_DIR=``, with which ``find_package(unet_rt)`` gives ``unet_rt::unet_rt``."""
    return str(_PACKAGE / "cmake")
