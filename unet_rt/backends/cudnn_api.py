"""cuDNN's graph interface (version 9), through the C functions of its library: what the cuDNN backend needs of it.

A convolution with bias and activation is described as a graph of operations; heuristics propose engine
configurations; a configuration becomes an execution plan; a plan runs with pointers. Handles and device memory are the
caller's. Nothing here needs a GPU before :class:`Handle`: proposals and plans can also be made for a GPU that is
described by its properties (:func:`described_device`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from ctypes import byref, c_bool, c_char, c_float, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from unet_rt.device import DeviceMemoryError
from unet_rt.errors import BackendError

Activation = Literal["none", "relu"]
Type = Literal["fp16", "bf16", "fp32"]

_LIBRARY: Final = "libcudnn.so.9"

# Values of cudnn_graph.h, which do not change within a major version.
_DATA_TYPES: Final = {"fp32": 0, "fp16": 2, "bf16": 9}
_BYTES: Final = {"fp32": 4, "fp16": 2, "bf16": 2}
_HEURISTICS: Final = {"A": 3, "B": 1, "FALLBACK": 2}
MODES: Final = tuple(_HEURISTICS)  # what can be asked, best first

_POINTWISE, _CONVOLUTION, _ENGINE, _ENGINE_CONFIG, _HEURISTIC, _PLAN = 0, 1, 2, 3, 4, 5
_KNOB_CHOICE, _CONVOLUTION_FORWARD, _POINTWISE_OPERATION, _GRAPH, _VARIANT_PACK, _TENSOR = 7, 10, 13, 15, 16, 17
_DEVICE_PROPERTIES: Final = 38

_T_HANDLE, _T_DATA_TYPE, _T_BOOLEAN, _T_INT64, _T_FLOAT, _T_POINTER = 0, 1, 2, 3, 4, 6
_T_CONVOLUTION_MODE, _T_HEURISTIC_MODE, _T_KNOB, _T_NUMERICAL_NOTE, _T_POINTWISE_MODE = 7, 8, 9, 11, 14
_T_DESCRIPTOR, _T_CHAR = 15, 24

_ADD, _RELU = 0, 100
_CROSS_CORRELATION: Final = 1
# Engines that round the inputs to fewer bits, sum in FP16, may give other bits from run to run, or compute by transforms
# (FFT, Winograd) that lose precision.
_NOTES_REFUSED: Final = frozenset({1, 2, 3, 4, 5, 6, 7, 8})
_DEVICE_ALLOCATION_FAILED: Final = 4004  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED


class CudnnError(BackendError):
    """cuDNN refuses something; an engine configuration that is refused can be passed over."""


class Library:
    """The functions of libcudnn that are used here."""

    def __init__(self, path: str) -> None:
        self.path = path
        library = ctypes.CDLL(path)
        pointer = c_void_p
        for name, arguments in {
            "cudnnCreate": (ctypes.POINTER(pointer),),
            "cudnnDestroy": (pointer,),
            "cudnnSetStream": (pointer, pointer),
            "cudnnBackendCreateDescriptor": (c_int, ctypes.POINTER(pointer)),
            "cudnnBackendDestroyDescriptor": (pointer,),
            "cudnnBackendFinalize": (pointer,),
            "cudnnBackendSetAttribute": (pointer, c_int, c_int, c_int64, pointer),
            "cudnnBackendGetAttribute": (pointer, c_int, c_int, c_int64, ctypes.POINTER(c_int64), pointer),
            "cudnnBackendExecute": (pointer, pointer, pointer),
        }.items():
            function = getattr(library, name)
            function.restype, function.argtypes = c_int, arguments
            setattr(self, name, function)
        library.cudnnGetVersion.restype = c_size_t
        library.cudnnGetErrorString.restype = ctypes.c_char_p
        library.cudnnGetErrorString.argtypes = (c_int,)
        library.cudnnGetLastErrorString.restype = None
        library.cudnnGetLastErrorString.argtypes = (ctypes.c_char_p, c_size_t)
        self._library = library

    def __getattr__(self, name: str) -> Any:  # the functions set above
        raise AttributeError(name)

    @property
    def version(self) -> tuple[int, int, int]:
        number = int(self._library.cudnnGetVersion())
        return number // 10000, number // 100 % 100, number % 100

    def check(self, status: int, what: str) -> None:
        """Raises :class:`CudnnError` for a status other than success, DeviceMemoryError where device memory is short."""
        if status == 0:
            return
        text = ctypes.create_string_buffer(2048)
        self._library.cudnnGetLastErrorString(text, len(text))
        name = self._library.cudnnGetErrorString(status).decode()
        detail = text.value.decode(errors="replace").strip()
        message = f"cuDNN fails in {what}: {name}{f' ({detail})' if detail else ''}"
        if status == _DEVICE_ALLOCATION_FAILED:
            raise DeviceMemoryError(f"{message}; use a smaller --tile or --batch, or free what others hold")
        raise CudnnError(message)


def candidates() -> list[str]:
    """Where libcudnn may be, best first: NVIDIA's wheel (which PyTorch and ONNX Runtime load), the system's."""
    found = []
    try:
        spec = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        spec = None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / "lib" / _LIBRARY
        if path.is_file():
            found.append(str(path))
    return [*found, _LIBRARY]


def _load_cublas(path: str) -> None:
    """Loads the library that cuDNN would end the process for want of: from the wheels beside it, or the system's."""
    folders = [Path(path).parent.parent.parent / name / "lib" for name in ("cu13", "cublas")]
    beside = [str(p) for folder in folders for p in sorted(folder.glob("libcublasLt.so.*"))]
    reasons = []
    for name in (*beside, "libcublasLt.so.13", "libcublasLt.so.12"):
        try:
            ctypes.CDLL(name)
            return
        except OSError as error:
            reasons.append(str(error))
    raise OSError(reasons[0])


@functools.cache
def library() -> Library:
    """The library; loaded once.

    Raises:
        BackendError: It is not there, or cannot be loaded.
    """
    reasons = []
    for path in candidates():
        try:
            _load_cublas(path)
            return Library(path)
        except (OSError, AttributeError) as error:
            reasons.append(str(error))
    raise BackendError(f"cuDNN 9 cannot be loaded ({'; '.join(reasons)}); pip install nvidia-cudnn-cu13 nvidia-cublas")


class Descriptor:
    """A descriptor of the backend interface, destroyed with this object."""

    def __init__(self, kind: int) -> None:
        self._library = library()
        self.pointer = c_void_p()
        self._kept: list[Any] = []  # descriptors refer to each other
        self._library.check(
            self._library.cudnnBackendCreateDescriptor(kind, byref(self.pointer)), f"creating a descriptor {kind}"
        )

    def __del__(self) -> None:
        pointer: c_void_p | None = getattr(self, "pointer", None)
        if pointer is not None and pointer.value is not None:
            self._library.cudnnBackendDestroyDescriptor(self.pointer)
            self.pointer = c_void_p()

    def put(self, attribute: int, kind: int, values: ctypes.Array[Any]) -> None:
        status = self._library.cudnnBackendSetAttribute(
            self.pointer, attribute, kind, len(values), ctypes.cast(values, c_void_p)
        )
        self._library.check(status, f"setting attribute {attribute}")

    def put_ints(self, attribute: int, values: Sequence[int]) -> None:
        self.put(attribute, _T_INT64, (c_int64 * len(values))(*values))

    def put_enum(self, attribute: int, kind: int, value: int) -> None:
        self.put(attribute, kind, (c_int * 1)(value))

    def put_bool(self, attribute: int, value: bool) -> None:
        self.put(attribute, _T_BOOLEAN, (c_bool * 1)(value))

    def put_float(self, attribute: int, value: float) -> None:
        self.put(attribute, _T_FLOAT, (c_float * 1)(value))

    def put_handle(self, attribute: int, handle: Handle) -> None:
        self.put(attribute, _T_HANDLE, (c_void_p * 1)(handle.pointer))

    def put_pointers(self, attribute: int, values: Sequence[int | None]) -> None:
        self.put(attribute, _T_POINTER, (c_void_p * len(values))(*values))

    def put_descriptors(self, attribute: int, values: Sequence[Descriptor]) -> None:
        self._kept.extend(values)
        self.put(attribute, _T_DESCRIPTOR, (c_void_p * len(values))(*(value.pointer for value in values)))

    def get(self, attribute: int, kind: int, values: ctypes.Array[Any]) -> int:
        """Fills ``values``; returns how many there are."""
        count = c_int64()
        status = self._library.cudnnBackendGetAttribute(
            self.pointer, attribute, kind, len(values), byref(count), ctypes.cast(values, c_void_p)
        )
        self._library.check(status, f"reading attribute {attribute}")
        return int(count.value)

    def finalize(self, what: str) -> Descriptor:
        self._library.check(self._library.cudnnBackendFinalize(self.pointer), what)
        return self


class Handle:
    """A cuDNN handle on the current device, computing on ``stream`` (a raw ``cudaStream_t``)."""

    def __init__(self, stream: int = 0) -> None:
        self._library = library()
        self.pointer = c_void_p()
        self._library.check(self._library.cudnnCreate(byref(self.pointer)), "creating a handle")
        try:
            self._library.check(self._library.cudnnSetStream(self.pointer, c_void_p(stream)), "setting the stream")
        except CudnnError:
            self.close()
            raise

    def close(self) -> None:
        """With the handle's context active. Closing twice is allowed."""
        if self.pointer.value is not None:
            self._library.cudnnDestroy(self.pointer)
            self.pointer = c_void_p()


def described_device(properties: Mapping[str, Any]) -> Descriptor:
    """A GPU by its properties, in cuDNN's JSON names: plans for a GPU that is not here."""
    text = json.dumps(properties).encode()
    found = Descriptor(_DEVICE_PROPERTIES)
    found.put(2702, _T_CHAR, (c_char * len(text)).from_buffer_copy(text))
    return found.finalize("reading device properties")


# ------------------------------------------------------------------------------------------------------- convolutions


@dataclass(frozen=True)
class Convolution:
    """``activation(convolution(x, w) + bias)``, channels last, ungrouped; accumulated and added up in FP32.

    Attributes:
        batch: Of ``x`` and ``y``.
        size: Spatial sizes of ``x``, (Y, X).
        channels: Of ``x``.
        filters: Channels of ``y``.
        kernel: Spatial sizes of ``w``, whose layout is (filters, kernel Y, kernel X, channels).
        strides, dilations: Of the window.
        before, after: Zero padding.
        bias: Whether there is one: (filters,), in ``bias_type``.
        activation: What follows.
        type: Of ``x``, ``w`` and ``y``.
        x_strides, y_strides: Distance of images, rows and columns in elements; None: adjacent.
    """

    batch: int
    size: tuple[int, int]
    channels: int
    filters: int
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)
    bias: bool = True
    activation: Activation = "none"
    type: Type = "fp16"
    x_strides: tuple[int, int, int] | None = None
    y_strides: tuple[int, int, int] | None = None

    @property
    def out_size(self) -> tuple[int, int]:
        y, x = (
            (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
            for size, before, after, dilation, kernel, stride in zip(
                self.size, self.before, self.after, self.dilations, self.kernel, self.strides, strict=True
            )
        )
        return y, x

    @property
    def flops(self) -> int:
        """Multiplications and additions, two per product."""
        ky, kx = self.kernel
        oy, ox = self.out_size
        return 2 * self.batch * oy * ox * self.filters * self.channels * ky * kx

    @property
    def bytes(self) -> int:
        """Read and written at least."""
        ky, kx = self.kernel
        oy, ox = self.out_size
        read = self.batch * self.size[0] * self.size[1] * self.channels + self.filters * self.channels * ky * kx
        return _BYTES[self.type] * (read + self.batch * oy * ox * self.filters)


X, W, BIAS, Y = 1, 2, 3, 4  # identifiers of the tensors that have pointers
_AFTER_CONVOLUTION, _AFTER_BIAS = 5, 6


def _tensor(
    uid: int, shape: Sequence[int], strides: Sequence[int], kind: str, *, virtual: bool = False, alignment: int = 16
) -> Descriptor:
    found = Descriptor(_TENSOR)
    found.put_enum(901, _T_DATA_TYPE, _DATA_TYPES[kind])
    found.put_ints(902, shape)
    found.put_ints(903, strides)
    found.put_ints(906, [uid])
    found.put_ints(900, [alignment])
    if virtual:
        found.put_bool(907, True)
    return found.finalize("describing a tensor")


def _channels_last(
    n: int, c: int, y: int, x: int, strides: tuple[int, int, int] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of (N, C, Y, X) whose channels are adjacent."""
    image, row, column = strides or (y * x * c, x * c, c)
    return (n, c, y, x), (image, 1, row, column)


def graph(what: Convolution, handle: Handle | None) -> Descriptor:
    """The operations of a convolution; without a handle, for :func:`described_device`."""
    x = _tensor(X, *_channels_last(what.batch, what.channels, *what.size, what.x_strides), what.type)
    w = _tensor(W, *_channels_last(what.filters, what.channels, *what.kernel), what.type)
    between = _channels_last(what.batch, what.filters, *what.out_size)
    y = _tensor(Y, *_channels_last(what.batch, what.filters, *what.out_size, what.y_strides), what.type)
    acts = what.activation != "none"
    product = _tensor(_AFTER_CONVOLUTION, *between, "fp32", virtual=True) if what.bias or acts else y

    window = Descriptor(_CONVOLUTION)
    window.put_enum(100, _T_DATA_TYPE, _DATA_TYPES["fp32"])
    window.put_enum(101, _T_CONVOLUTION_MODE, _CROSS_CORRELATION)
    window.put_ints(102, what.dilations)
    window.put_ints(103, what.strides)
    window.put_ints(104, what.after)
    window.put_ints(105, what.before)
    window.put_ints(106, [2])
    window.finalize("describing a convolution")
    convolution = Descriptor(_CONVOLUTION_FORWARD)
    convolution.put_float(700, 1.0)
    convolution.put_float(701, 0.0)
    convolution.put_descriptors(702, [window])
    convolution.put_descriptors(703, [w])
    convolution.put_descriptors(704, [x])
    convolution.put_descriptors(705, [product])
    operations = [convolution.finalize("describing a convolution's operation")]

    if what.bias:
        bias = _tensor(BIAS, *_channels_last(1, what.filters, 1, 1), what.type)
        added = _tensor(_AFTER_BIAS, *between, "fp32", virtual=True) if acts else y
        operations.append(_pointwise(_ADD, product, added, bias=bias))
        product = added
    if acts:
        operations.append(_pointwise(_RELU, product, y))

    found = Descriptor(_GRAPH)
    if handle is not None:
        found.put_handle(800, handle)
    found.put_descriptors(801, operations)
    return found.finalize("describing a graph")


def _pointwise(mode: int, x: Descriptor, y: Descriptor, *, bias: Descriptor | None = None) -> Descriptor:
    form = Descriptor(_POINTWISE)
    form.put_enum(0, _T_POINTWISE_MODE, mode)
    form.put_enum(1, _T_DATA_TYPE, _DATA_TYPES["fp32"])
    form.finalize("describing an element-wise function")
    found = Descriptor(_POINTWISE_OPERATION)
    found.put_descriptors(750, [form])
    found.put_descriptors(751, [x])
    if bias is not None:
        found.put_descriptors(752, [bias])
    found.put_descriptors(753, [y])
    return found.finalize("describing an element-wise operation")


class Configuration:
    """An engine and its settings, as the heuristics proposed them."""

    def __init__(self, descriptor: Descriptor) -> None:
        self.descriptor = descriptor
        engine = Descriptor(_ENGINE)
        slot = (c_void_p * 1)(engine.pointer)
        descriptor.get(300, _T_DESCRIPTOR, slot)
        number = (c_int64 * 1)()
        engine.get(1301, _T_INT64, number)
        self.engine = int(number[0])
        notes = (c_int * 16)()
        self.notes = frozenset(notes[: engine.get(1303, _T_NUMERICAL_NOTE, notes)])
        self.knobs = self._knobs()
        self.name = f"eng{self.engine}" + "".join(f"_k{knob}={value}" for knob, value in self.knobs)

    def _knobs(self) -> tuple[tuple[int, int], ...]:
        most = 64
        choices = [Descriptor(_KNOB_CHOICE) for _ in range(most)]
        slots = (c_void_p * most)(*(choice.pointer for choice in choices))
        count = self.descriptor.get(302, _T_DESCRIPTOR, slots)
        found = []
        for choice in choices[: min(count, most)]:
            kind, value = (c_int * 1)(), (c_int64 * 1)()
            choice.get(600, _T_KNOB, kind)
            choice.get(601, _T_INT64, value)
            found.append((int(kind[0]), int(value[0])))
        return tuple(sorted(found))

    @property
    def faithful(self) -> bool:
        """Whether the engine repeats its bits and keeps inputs and sums at the precision asked."""
        return not self.notes & _NOTES_REFUSED


def configurations(
    operations: Descriptor, modes: Sequence[str] = MODES, device: Descriptor | None = None
) -> list[Configuration]:
    """What the heuristics propose, best first, each engine's settings once."""
    found: dict[str, Configuration] = {}
    reasons = []
    for mode in modes:
        try:
            for configuration in _proposed(operations, mode, device):
                found.setdefault(configuration.name, configuration)
        except CudnnError as error:
            reasons.append(f"{mode}: {error}")
    if not found:
        raise CudnnError(f"cuDNN has no engine for this convolution ({'; '.join(reasons) or 'none proposed'})")
    return list(found.values())


def _proposed(operations: Descriptor, mode: str, device: Descriptor | None) -> list[Configuration]:
    heuristic = Descriptor(_HEURISTIC)
    heuristic.put_descriptors(201, [operations])
    heuristic.put_enum(200, _T_HEURISTIC_MODE, _HEURISTICS[mode])
    if device is not None:
        heuristic.put_descriptors(204, [device])
    heuristic.finalize(f"heuristics {mode}")
    count = c_int64()
    heuristic._library.check(
        heuristic._library.cudnnBackendGetAttribute(heuristic.pointer, 202, _T_DESCRIPTOR, 0, byref(count), None),
        "counting engine configurations",
    )
    results = [Descriptor(_ENGINE_CONFIG) for _ in range(count.value)]
    if not results:
        return []
    slots = (c_void_p * len(results))(*(result.pointer for result in results))
    got = heuristic.get(202, _T_DESCRIPTOR, slots)
    for result in results:
        result._kept.append(operations)
    return [Configuration(result) for result in results[:got]]


class Plan:
    """An execution plan.

    Attributes:
        name: Engine and settings.
        workspace: Bytes of scratch memory.
    """

    def __init__(self, configuration: Configuration, handle: Handle | None, device: Descriptor | None = None) -> None:
        self.name, self.configuration = configuration.name, configuration
        plan = Descriptor(_PLAN)
        if handle is not None:
            plan.put_handle(400, handle)
        if device is not None:
            plan.put_descriptors(407, [device])
        plan.put_descriptors(401, [configuration.descriptor])
        self._plan = plan.finalize(f"making a plan of {configuration.name}")
        size = (c_int64 * 1)()
        plan.get(402, _T_INT64, size)
        self.workspace = int(size[0])

    def bind(self, x: int, w: int, bias: int, y: int, workspace: int) -> Launch:
        """The plan with addresses; ``bias`` 0: none. ``workspace``: an address with :attr:`workspace` bytes."""
        identifiers, pointers = [X, W, Y], [x, w, y]
        if bias:
            identifiers.append(BIAS)
            pointers.append(bias)
        pack = Descriptor(_VARIANT_PACK)
        pack.put_ints(1000, identifiers)
        pack.put_pointers(1001, pointers)
        pack.put_pointers(1003, [workspace or None])
        return Launch(self._plan, pack.finalize("describing the arrays of a run"))


class Launch:
    """A plan and its arrays."""

    def __init__(self, plan: Descriptor, pack: Descriptor) -> None:
        self._plan, self._pack, self._library = plan, pack, library()

    def __call__(self, handle: Handle) -> None:
        """Enqueues it on the handle's stream."""
        self._library.check(
            self._library.cudnnBackendExecute(handle.pointer, self._plan.pointer, self._pack.pointer),
            "running a convolution",
        )
