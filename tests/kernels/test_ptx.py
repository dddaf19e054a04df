"""The interpreter of compiled kernels: what instructions give, and that what a device would punish is found."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from ptx import Launch, Memory, PtxError, _fused, kernels_of, run

HEAD = ".version 9.0\n.target sm_90\n.address_size 64\n"
ENTRY = """.visible .entry kernel(
\t.param .align 8 .b8 kernel_param_0[16]
)
{
\t.reg .pred \t%p<9>;
\t.reg .b16 \t%rs<9>;
\t.reg .f32 \t%f<9>;
\t.reg .b32 \t%r<9>;
\t.reg .b64 \t%rd<9>;

\tld.param.u64 \t%rd1, [kernel_param_0];
\tld.param.u64 \t%rd2, [kernel_param_0+8];
\tmov.u32 \t%r1, %tid.x;
\tmul.wide.u32 \t%rd3, %r1, 4;
\tadd.s64 \t%rd4, %rd1, %rd3;
\tadd.s64 \t%rd5, %rd2, %rd3;
BODY
\tret;

}
"""
"""Thread i has input[i] at %rd4 and output[i] at %rd5."""


def carried_out(body: str, given: Any, dtype: str = "u4", threads: int | None = None) -> np.ndarray[Any, Any]:
    """The output of a kernel with 4 bytes of input and of output per thread."""
    source = np.ascontiguousarray(given)
    result = np.zeros(len(source), dtype)
    memory = Memory()
    memory.add(source.ctypes.data, source.nbytes)
    memory.add(result.ctypes.data, result.nbytes)
    kernel = kernels_of(HEAD + ENTRY.replace("BODY", body))["kernel"]
    run(
        kernel,
        Launch((1, 1, 1), threads or len(source), struct.pack("QQ", source.ctypes.data, result.ctypes.data)),
        memory,
    )
    return result


LOAD = "\tld.global.nc.u32 \t%r2, [%rd4];\n"
STORE = "\n\tst.global.u32 \t[%rd5], %r3;"


@pytest.mark.parametrize(
    ("instruction", "given", "expected"),
    [
        ("prmt.b32 %r3, %r2, 0, 0x0123;", [0x11223344], [0x44332211]),
        ("prmt.b32 %r3, %r2, 0, 0x8888;", [0x80, 0x7F], [0xFFFFFFFF, 0]),
        ("shf.r.wrap.b32 %r3, %r2, 7, 40;", [0xAABBCCDD], [0x07AABBCC]),
        ("shl.b32 %r3, %r2, 32;", [5], [0]),
        ("shr.s32 %r3, %r2, 99;", [0x80000000], [0xFFFFFFFF]),
        ("mul.hi.u32 %r3, %r2, -1;", [0x80000000], [0x7FFFFFFF]),
        ("rem.s32 %r3, %r2, 3;", [-7 % 2**32], [-1 % 2**32]),
        ("cvt.s32.s8 %r3, %r2;", [0x180, 0x7F], [0xFFFFFF80, 0x7F]),
        ("max.NaN.f16x2 %r3, %r2, 0x3c00bc00;", [0x7E004000], [0x7E004000]),
        ("max.NaN.f16x2 %r3, %r2, 0x3c00bc00;", [0x0000C000], [0x3C00BC00]),
        ("clz.b32 %r3, %r2;", [0x00010000, 0], [15, 32]),
    ],
)
def test_integers(instruction: str, given: list[int], expected: list[int]) -> None:
    body = LOAD + "\t" + instruction.replace(" ", " \t", 1) + STORE
    np.testing.assert_array_equal(carried_out(body, np.array(given, "u4")), np.array(expected, "u4"))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("setp.lt.f32", [True, False, False]),
        ("setp.ne.f32", [True, False, False]),
        ("setp.neu.f32", [True, False, True]),
        ("setp.geu.f32", [False, True, True]),
        ("setp.nan.f32", [False, False, True]),
    ],
)
def test_comparisons_know_nan(instruction: str, expected: list[bool]) -> None:
    body = (
        f"\tld.global.f32 \t%f1, [%rd4];\n\t{instruction} \t%p1, %f1, 0f3F800000;\n\tselp.b32 \t%r3, 1, 0, %p1;{STORE}"
    )
    assert carried_out(body, np.float32([-2, 1, np.nan])).astype(bool).tolist() == expected


def test_fused_products_are_rounded_once() -> None:
    """Against exact arithmetic; numbers whose product lies beside the middle between two floats among them."""
    rng = np.random.default_rng(0)
    a, b, c = (
        rng.standard_normal(3000).astype(np.float32) * np.float32(2) ** rng.integers(-20, 20, 3000) for _ in "abc"
    )
    near = np.float32(1 + 2.0**-12)
    a = np.concatenate([a, [near, near]]).astype(np.float32)
    b = np.concatenate([b, [near, near]]).astype(np.float32)
    c = np.concatenate([c, [2.0**-60, -(2.0**-60)]]).astype(np.float32)
    for x, y, z, found in zip(a.tolist(), b.tolist(), c.tolist(), _fused(a, b, c), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        below, above = np.nextafter(found, np.float32(-np.inf)), np.nextafter(found, np.float32(np.inf))
        error = abs(Fraction(float(found)) - exact)
        assert error <= abs(Fraction(float(below)) - exact)
        assert error <= abs(Fraction(float(above)) - exact)


def test_threads_go_ways_of_their_own() -> None:
    """A loop of as many turns as the thread's number says."""
    body = """\tmov.u32 \t%r3, 0;
\tmov.u32 \t%r4, 0;

$L__BB0_1:
\tsetp.ge.u32 \t%p1, %r4, %r1;
\t@%p1 bra \t$L__BB0_2;

\tadd.s32 \t%r3, %r3, %r4;
\tadd.s32 \t%r4, %r4, 1;
\tbra.uni \t$L__BB0_1;

$L__BB0_2:"""
    found = carried_out(body + STORE, np.zeros(50, "u4"))
    np.testing.assert_array_equal(found, [n * (n - 1) // 2 for n in range(50)])


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("\tld.global.nc.v2.u32 \t{%r2, %r3}, [%rd4];" + STORE, "no multiple"),
        (LOAD + "\tst.global.u32 \t[%rd5+4], %r2;", "in no array"),
        ("\tld.global.u32 \t%r2, [%rd4+-4];", "in no array"),
        ("\tst.global.u32 \t[%rd2], %r1;", "two threads of a launch write one byte"),
        ("\tst.global.u32 \t[%rd5], %r1;\n\tld.global.u32 \t%r2, [%rd2];", "that a thread of the same launch writes"),
        ("\tld.global.u32 \t%r2, [%rd2];\n\tst.global.u32 \t[%rd5], %r1;", "another thread of the launch reads"),
        ("\tld.global.nc.u32 \t%r2, [%rd5];\n\tst.global.u32 \t[%rd5], %r2;", "reads as read-only"),
        ("\tprmt.b32.f4e \t%r3, %r1, %r1, 1;", "not known here: prmt.b32.f4e"),
        ("\tbfe.u32 \t%r3, %r1, 3, 4;", "not known here: bfe.u32"),
        ("\tadd.rz.f32 \t%f1, %f2, %f3;", "not known here: add.rz.f32"),
    ],
)
def test_what_a_device_would_punish_is_found(body: str, error: str) -> None:
    with pytest.raises(PtxError, match=error):
        carried_out(body, np.arange(8, dtype="u4"))


def test_launches_of_another_body_are_refused() -> None:
    kernel = kernels_of(HEAD + ENTRY.replace("BODY", ""))["kernel"]
    with pytest.raises(PtxError, match="takes 16 bytes, 8 were given"):
        run(kernel, Launch((1, 1, 1), 32, bytes(8)), Memory())
