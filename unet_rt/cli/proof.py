"""The report of doctor --prove, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Report = Mapping[str, Any]


def disagreements(report: Report) -> list[str]:
    """What ran and gave something else than it should: kernels unlike their twins, engines outside their budget."""
    found = [f"{row['name']} on {row['device']}" for row in _rows(report, "kernels") if not row["agrees"]]
    return found + [_title(row) for row in _rows(report, "engines") if not row["accepted"]]


def proof_text(report: Report) -> str:
    """A table of what ran, what did not and why."""
    lines = [f"unet-rt {report['unet_rt']} on {report['device']}, {report['seconds']:.0f} s"]
    for row in _rows(report, "kernels"):
        how = "equal" if row["equal"] else f"{'within rounding' if row['agrees'] else 'DIFFERS'}, {row['max_abs']:.2g}"
        lines.append(f"  {row['name']:<36} {row['device']:<8} {how:<24} {row.get('ms', 0.0):9.2f} ms")
    for row in _rows(report, "engines"):
        change = row["label_change"]
        labels = f"labels changed {change:.4%}" if change is not None else f"error {row['relative_error']:.1e}"
        seams = row["tiles_differ_from_whole"]
        whole = "" if seams is None else "tiles equal whole" if seams == 0 else f"tiles within {seams:.1e} of whole"
        verdict = "" if row["accepted"] else "OUTSIDE its budget"
        lines.append(f"  {_title(row):<36} {labels:<28} {whole:<32} {row['ms_per_tile']:9.1f} ms {verdict}".rstrip())
    for row in _rows(report, "speed"):
        low, high = row["interval"]
        times = f"{row['times_eager']:.2f} times eager ({low:.2f} to {high:.2f})"
        lines.append(f"  {row['name']:<44} {times:<36} {row['ms_per_tile']:9.1f} ms")
    for name, section in report["sections"].items():
        for failed in section.get("failed", []):
            lines.append(f"  no result: {failed['what']}: {failed['why'].splitlines()[0][:200]}")
        if "ended" in section:
            lines.append(f"  {name}: {section['ended']}")
    bad = disagreements(report)
    lines.append("all that ran agrees" if not bad else f"DISAGREES: {', '.join(bad)}")
    return "\n".join(lines)


def _rows(report: Report, table: str) -> Iterator[Mapping[str, Any]]:
    for section in report["sections"].values():
        yield from section.get(table, [])


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['network']} {row['backend']} {row['precision']}"
