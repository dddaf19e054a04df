"""The figures of all sections as text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

WAYS = {
    "fixed": "host to host, declared numbers",
    "own": "host to host, the image's own statistics",
    "device": "CUDA tensor to CUDA tensor, declared numbers",
}


def tables(results: dict[str, Any]) -> str:
    """Everything worth reading, as text; sections without figures say why."""
    roof = results.get("roof", {})
    lines = ["== roof: " + ", ".join(f"{k} {v:.1f}" for k, v in roof.items() if k.endswith(("_tflops", "gb_s")))]
    lines += kernel_lines(results.get("kernels", {}).get("rows", []))
    for name in ("paper", "nuclei", "compile-default", "compile-max"):
        lines += engine_lines(name, results.get(name, {}).get("rows", []), roof)
    for name in ("predict-paper", "predict-nuclei"):
        lines += predict_lines(name, results.get(name, {}).get("rows", []))
    for r in results.get("repeat", {}).get("rows", []):
        lines.append(
            f"== repeat: {r['engine']}: {r['runs']} runs of {r['ms']:.2f} ms, device memory grew by "
            f"{r['device_grown_bytes']:,} bytes, resident by {r['resident_grown_bytes']:,}; same result: {r['same']}"
        )
    for name, figures in results.items():
        lines += other_lines(name, figures)
    seconds = ", ".join(f"{name} {f.get('seconds', '?')}" for name, f in results.items())
    return "\n".join([*lines, f"== seconds: {seconds}"])


def kernel_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    if rows:
        yield "== kernels (share of copy bandwidth on the same bytes: launched from Python | replayed from a graph)"
    for r in rows:
        graph = f"{r['share_graph']:6.2f} {r['gb_s_graph']:7.0f} GB/s" if "share_graph" in r else ""
        yield f"  {r['name']:58s} {r['kernel_us']:9.1f} us  {r['share']:6.2f} | {graph}"


def engine_lines(name: str, rows: list[dict[str, Any]], roof: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys((r["tile"], r["batch"]) for r in rows):
        yield f"== {name}: tile {key[0]} px, batch {key[1]}"
        group = [r for r in rows if (r["tile"], r["batch"]) == key]
        slowest = next((r["median_ms"] for r in group if r["name"] == "eager FP32"), math.nan)
        for r in group:
            peak = roof.get(f"{r['roof']}_tflops")
            share = f"{r['tflops'] / peak:5.1%} of {r['roof']}" if peak else ""
            other = r.get("held_against", "eager FP32")
            yield (
                f"  {r['name']:48s} {r['median_ms']:9.3f} ms ({r['low_ms']:.3f} to {r['high_ms']:.3f})"
                f" {r['tiles_per_s']:8.1f} tiles/s {slowest / r['median_ms']:6.2f} x  {r['tflops']:6.1f} TFLOP/s"
                f" {share}  labels equal {r.get('label_agreement', math.nan):.4%}"
                + (f" to {other}" if other != "eager FP32" else "")
            )


def predict_lines(name: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    for r in rows:
        yield (
            f"== {name}: {r['engine']}, {r['side']} px: {r['tiles']} tiles of {r['tile']}, {r['batch']} per run; engine "
            f"alone {r['engine_s']:.3f} s, statistics {r['statistics_s']:.3f} s; labels changed "
            f"{r.get('changed_labels', math.nan):.5%} of {r.get('labels_compared', 0):,}; stages {r['stages']}"
        )
        for way, said in WAYS.items():
            if f"{way}_s" in r:
                yield (
                    f"     {said:44s} {r[f'{way}_s']:8.3f} s ({r[f'{way}_low_s']:.3f} to {r[f'{way}_high_s']:.3f}), "
                    f"{r[f'{way}_mpx_per_s']:7.0f} Mpx/s, {r[f'{way}_ratio']:.3f} of the engine alone"
                    + (f", equal to the first: {r[f'{way}_equal']}" if f"{way}_equal" in r else "")
                )


def other_lines(name: str, figures: dict[str, Any]) -> Iterator[str]:
    """What was built, and what could not run."""
    for built in figures.get("built", []):
        yield (
            f"== built {built['net']} {built['backend']} {built['precision']}: {built['kind']}, "
            f"{built['seconds']:.1f} s {built['note'][:120]}"
        )
    if "no_device" in figures:
        yield f"== {name}: no device: {figures['no_device']}"
    if "ended" in figures:
        yield f"== {name}: {figures['ended']}"
    for failure in figures.get("failed", []):
        yield f"!! {name}: {failure['what']}: {failure['why'][:400]}"
