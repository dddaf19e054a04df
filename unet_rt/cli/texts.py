"""Reports for people: what inspect, build, predict, verify and bench found, as text. Nothing here decides anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.parity import judged_outputs
from ..errors import size_text

if TYPE_CHECKING:
    from ..building.quantiser import LayerCost
    from ..building.report import BuildReport
    from ..engine.parity import ImageParity, Verdict
    from ..graph.report import GraphReport
    from ..judging.bench import BenchReport
    from ..judging.verify import VerifyReport
    from ..outputs.tables import Summary
    from ..prediction.report import RunReport
    from ..system.timing import Timing


CERTAIN_ROUNDS = 6  # whose range holds the median with 95 %
OUTSIDE_TOLD = 0.05  # share of pixels outside the range seen at build from which on the result is worth a look


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _count_text(n: int, thing: str) -> str:
    return f"{n:,} {thing}" + ("" if n == 1 else "s")


def _size_text(n: int) -> str:
    return f"{n / 1e6:,.0f} MB" if n < 1e10 else f"{n / 1e9:,.0f} GB"


def _flop_text(n: float) -> str:
    return f"{n / 1e6:.3g} MFLOP" if n >= 1e6 else f"{n / 1e3:.3g} kFLOP" if n >= 1e3 else f"{n:.0f} FLOP"


def inspect_text(report: GraphReport) -> str:
    """What a graph says about itself."""
    lines = []
    for i in report.inputs:
        size = ", ".join(f"{a}={'any' if n is None else n}" for a, n in zip(i.axes, i.shape, strict=True))
        lines.append(f"input   {i.name}: {i.axes} ({size}) {i.dtype}")
    lines.append(
        f"        {_count_text(report.parameters, 'parameter')}, {_flop_text(report.flops_per_pixel)} per output pixel"
    )
    letters = [a for a in report.inputs[0].axes if a not in "NC"]
    for letter, s in zip(letters, report.sizes, strict=True):
        if s.fixed is not None:
            rule = f"{s.fixed} px only"
        elif s.stride == 1:
            rule = f"any size from {s.at_least(1)} px"
        elif s.remainder == 0:
            rule = f"multiples of {s.stride} px from {s.at_least(1)}"
        else:
            example = s.at_least(500)
            rule = f"{s.remainder} modulo {s.stride} px, from {s.at_least(1)}: {example}, {example + s.stride}, ..."
        lines.append(f"tiles   {letter}: {rule}")
    lines += _form_lines(report)
    lines += [f"        made free: {what}" for what in report.freed]
    lines += [f"        stays fixed: {why}" for why in report.reasons_fixed]
    images = report.images
    for o, final in zip(report.outputs, report.final_ops, strict=True):
        lines.append(f"output  {o.name}: {o.axes}, {_count_text(o.channels, 'channel')}, last operator {final}")
        rows: list[tuple[str, ...]] = [("axis", "stride", "reach", "halo", "shrink", "scale")]
        for letter, f in zip((a for a in o.axes if a not in "NC"), o.field, strict=False):  # none where unknown
            pairs = (f"{b}+{a}" for b, a in (f.reach, f.halo, f.shrink))
            rows.append((letter, str(f.stride), *pairs, str(f.scale)))
        if o.field:
            lines.append(_align(rows))
        if o not in images:
            lines.append("  no image: left out by build")
        else:
            lines.append(
                "  exact: tiles equal the whole image" if o.exact else "  NOT exact: the tile size changes the answer"
            )
        lines += [f"    {reason}" for reason in o.reasons]
        if o in images and o.exact:
            lines += [f"    only {limit}; predict refuses larger images" for limit in report.limits]
        if o.note:
            lines.append(f"    {o.note}")
    exact = report.exact
    lines.append("cost of exactness (computed over kept pixels of inner tiles)" if exact else "memory of tiles")
    costs: list[tuple[str, ...]] = []
    for entry in report.cost.values():
        ratio, tile = entry["ratio"], entry["tile"]
        memory = f"{_size_text(report.activation_bytes(tile))} of activations"
        size = size_text(tile) + " px"
        kept = "keeps nothing" if ratio is None else f"{ratio:.2f}"
        costs.append((size, kept, memory) if exact else (size, memory))
    lines.append(_align(list(dict.fromkeys(costs))))
    return "\n".join(lines)


def _form_lines(report: GraphReport) -> list[str]:
    """What becomes of a file that another tool has given a form of its own."""
    lines = [f"        rewritten: {what}" for what in report.rewritten]
    if report.precision == "int8":
        lines.append("        quantised: build runs it as given, in ONNX Runtime, and holds it against itself")
    elif report.precision in ("fp16", "bf16"):
        lines.append(f"        computes in {report.precision}: build widens it to fp32, the baseline")
    return lines


def _layer_table(layers: Sequence[LayerCost]) -> list[str]:
    """What returning layers to FP32 won and cost, best first; those that were put back, and the next few."""
    last = max((k for k, layer in enumerate(layers) if layer.kept), default=-1)
    shown = layers[: last + 4]
    rows: list[tuple[str, ...]] = [("", "layer in FP32", "takes away", "work")]
    rows += [("->" if x.kept else "", x.name, f"{x.won:.1%}", f"{x.cost:.1%}") for x in shown]
    lines = [
        "  layers by what they take away of INT8's change near the decision, and their share of the work",
        _align(rows),
    ]
    if len(shown) < len(layers):
        lines.append(f"  ... and {_count_text(len(layers) - len(shown), 'layer')} that win less for their work")
    return [*lines, ""]


def _candidate_table(report: BuildReport) -> list[str]:
    """Every candidate with its speed and its parity, the chosen one marked; why others were not tried."""
    kinds = {report.spec.contract_of(k).has_labels for k in judged_outputs(report.spec)}
    judged = " and ".join(what for has, what in ((True, "labels changed"), (False, "largest error")) if has in kinds)
    rows: list[tuple[str, ...]] = [
        ("", "backend", "precision", "tile", "ms", "kept Mpx/s", "peak MB", judged, "lowest Dice", "")
    ]
    untried: list[str] = []
    for k, c in enumerate(report.candidates):
        v = c.verdict
        mark = "->" if k == report.chosen else ""
        if c.latency_ms is None:
            untried.append(f"  not tried: {c.backend} {c.precision}: {c.note}")
            continue
        change = "-" if v is None else _change_text(v)
        dice = "-" if v is None or v.dice is None else f"{v.dice:.4f}"
        note = "" if v is None or v.accepted else "outside the budget: " + v.reasons[0]
        note = "; ".join(part for part in (c.variant, note) if part)
        rows.append(
            (
                mark,
                c.backend,
                c.precision,
                size_text(c.tile),
                f"{c.latency_ms:.3g}" if c.latency_ms < 100 else f"{c.latency_ms:.0f}",
                f"{c.kept_mpx_per_s or 0:.3g}",
                f"{c.peak_mb or 0:.0f}",
                change,
                dice,
                note,
            )
        )
    return [_align(rows), *untried, ""]


def build_text(report: BuildReport) -> str:
    """What build did, for people."""
    spec = report.spec
    contract = spec.contract
    normalization = contract.normalization.method if contract.normalization else "not declared"
    lines = [f"input   {contract.axes}, {_count_text(spec.channels, 'channel')}, normalisation {normalization}"]
    for k, o in enumerate(spec.outputs):
        said = spec.contract_of(k)
        classes = f", classes {', '.join(said.classes)}" if said.classes else ""
        name = f"{o.name}: " if len(spec.outputs) > 1 else ""
        reading = f"{said.task or 'task left open'}, {said.output_is or 'values'}{classes}"
        lines.append(f"output  {name}{_count_text(o.channels, 'channel')}: {reading}")
    first = report.first
    low, high = first["input_range"]
    text = f"first   {first['name']}: input {low:.3g} to {high:.3g}, "
    text += f"mean {first['input_mean']:.3g}, deviation {first['input_std']:.3g}"
    if "class_share" in first:
        text += "; " + ", ".join(f"{_class_text(name)} {share:.1%}" for name, share in first["class_share"].items())
    if "output_range" in first:
        text += "; output {:.3g} to {:.3g}".format(*first["output_range"])
    lines += [text, f"        {first['reading']}", ""]
    lines += _candidate_table(report)
    if report.layers:
        lines += _layer_table(report.layers)
    lines += [f"  {note}" for note in report.notes]
    if report.whole_mismatch is not None:
        m = report.whole_mismatch
        changed = (
            f"{m.label_change:.3%} of labels"
            if m.label_change is not None
            else f"{m.relative:.2e} of the output's range"
        )
        lines.append(
            f"  tiles against the whole image: {changed}{_of_output(m)} differ on {m.name} (reported, not judged)"
        )
    on = (
        _count_text(report.samples, "sample window")
        if report.kind == "samples"
        else f"synthetic tiles (a proof for {spec.precision} only)"
    )
    lines += ["", f"{report.folder}: {spec.backend} {spec.precision}, parity on {on}"]
    if report.advice:
        lines.append(f"to prove it on your images, and to allow faster precisions: {report.advice}")
    return "\n".join(lines)


def _change_text(verdict: Verdict) -> str:
    """The worst image's changed labels and largest error, whichever there are."""
    parts = [] if verdict.label_change is None else [f"{verdict.label_change:.4%}"]
    return ", ".join(parts if verdict.error is None else [*parts, f"{verdict.error:.1e}"])


def _class_text(name: str) -> str:
    """A class's name; one that has only a number is told apart from the figures around it."""
    return f"class {name}" if name.isdecimal() else name


def run_text(report: RunReport, target: Path | None = None) -> str:
    """What one prediction did."""
    halo = "blended" if report.halo is None else "halo " + "x".join(str(max(h)) for h in report.halo)
    stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.stages.items())
    tiles = f"{_count_text(report.tiles, 'tile')} of {size_text(report.tile)} px, {halo}"
    where = f"  {report.backend} {report.precision} on {report.device}; {tiles}"
    lines = [
        report.reading,
        where,
        f"  {report.mpx:.3g} Mpx in {report.seconds:.2f} s ({report.mpx_per_s:.3g} Mpx/s)",
        f"  seconds busy: {stages}; peak memory {report.peak_rss_bytes / 1e6:.0f} MB",
    ]
    if report.class_share:
        lines.append("  " + ", ".join(f"{_class_text(name)} {share:.2%}" for name, share in report.class_share.items()))
    if report.range_warning:
        lines.insert(0, f"WARNING: {report.range_warning}")
    elif report.outside_range:
        lines.append(f"  {report.outside_range:.3%} of pixels, normalised, lie outside the range seen at build")
    lines += [f"  {note}" for note in report.notes]
    if target is not None:
        lines.append(f"  -> {target}")
    if report.found is not None:
        lines.append("  " + _found_text(report.found))
    return "\n".join(lines)


def _found_text(found: Summary) -> str:
    def number(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    median = "" if found.median_px is None else f", median {number(found.median_px)} px"
    size = "" if found.median_area is None else f" ({number(found.median_area)} {found.unit})"
    return f"{_count_text(found.objects, 'object')}{median}{size}"


def verify_text(report: VerifyReport) -> str:
    """What verify measured."""
    v = report.verdict
    heads = len({image.head for image in v.images})
    on = "its exam" if report.kind == "exam" else _count_text(len(v.images) // max(1, heads), "window")
    lines = [f"{report.engine} on {on}: {'inside' if v.accepted else 'OUTSIDE'} the budget"]
    if v.label_change is not None:
        dice = (
            f"lowest Dice {v.dice:.4f} (budget {report.budget.dice})"
            if v.dice is not None
            else "no class is large enough for Dice"
        )
        lines.append(
            f"  labels changed: worst {v.label_change:.4%}, mean {v.mean_label_change or 0.0:.4%} "
            f"(budget {report.budget.labels:.4%}); {dice}"
        )
    bound = "" if v.error is None else f" (budget {report.budget.error:g})"
    lines.append(f"  largest error {v.max_abs:.3g}, {v.relative:.2e} of the output's range{bound}")
    for head in dict.fromkeys(image.head for image in v.images if not image.judged):
        error = max(image.relative for image in v.images if image.head == head)
        lines.append(f"  output {head}, not judged: largest error {error:.2e} of its range")
    if report.seams is not None:
        seams = report.seams
        lines.append(
            "  tiled equals whole, bit for bit"
            if seams.max_abs == 0
            else f"  tiling alone changes values{_of_output(seams)} by {seams.max_abs:.2e}"
        )
    if report.growth is not None and report.growth.changed:
        grown = report.growth
        what = "the range of values" if grown.label_change is None else "labels"
        lines.append(
            f"  growing images to accepted sizes changes {grown.changed:.3%} of {what}{_of_output(grown)}, "
            "near right and bottom edges"
        )
    if report.truth is not None:
        t = report.truth
        lines.append(
            f"  against labels{f' of {t.head}' if t.head else ''}: Dice {t.engine_dice:.4f}, IoU {t.engine_iou:.4f} "
            f"(FP32: {t.baseline_dice:.4f}, {t.baseline_iou:.4f}); "
            f"largest drop on an image {t.drop:.4f} (budget {report.budget.truth:g})"
        )
    lines += [f"  {line}" for line in (*v.reasons, *report.notes)]
    if report.speed is not None:
        lines.append(f"  {report.speed.sentence}")
    if report.picture is not None:
        lines.append(f"  worst tile: {report.picture}")
    return "\n".join(lines)


def _of_output(image: ImageParity) -> str:
    """Which output, where there are several."""
    return f" of output {image.head}" if image.head else ""


def bench_text(report: BenchReport) -> str:
    """What bench measured: one table."""
    judged = "labels equal" if any(r.label_agreement is not None for r in report.rows) else "largest error"
    head = ("", "ms per tile", "s", "Mpx/s", "peak MB", judged, "seam error", "speed")
    rows: list[tuple[str, ...]] = [head]
    for r in report.rows:
        rows.append(
            (
                r.name,
                _spread_text(r.tile, 1e3),
                _spread_text(r.window, 1),
                f"{r.mpx_per_s:.3g}",
                f"{r.window.peak_bytes / 1e6:.0f}",
                f"{r.relative_error:.1e}" if r.label_agreement is None else f"{r.label_agreement:.4%}",
                "-" if r.seam is None else f"{r.seam:.1e}",
                f"{r.speed.median:.2f} ({r.speed.low:.2f} to {r.speed.high:.2f})",
            )
        )
    rounds = min(r.window.runs for r in report.rows)
    tiles = f"{_count_text(report.tiles, 'tile')} of {size_text(report.tile)} px"
    lines = [
        f"{report.model} on {report.image}: {size_text(report.shape)} px, {tiles}, {_count_text(report.threads, 'thread')}",
        _align(rows),
        f"  medians (fastest to slowest) of {_count_text(rounds, 'round')} in turn; speed: {report.baseline} = 1, with "
        + ("its 95 % interval" if rounds >= CERTAIN_ROUNDS else "the range of the rounds: too few for a 95 % interval"),
    ]
    lines += [f"  not run: {name}: {why}" for name, why in report.skipped.items()]
    return "\n".join([*lines, *(f"  {note}" for note in report.notes)])


def _spread_text(timing: Timing, unit: float) -> str:
    return f"{timing.median_s * unit:.3g} ({timing.low_s * unit:.3g} to {timing.high_s * unit:.3g})"
