"""The report of a check of a data set: its buckets for JSON, and the whole of it as text."""

from __future__ import annotations

from typing import Any

from mindtune.cli import indented_list, printable, size_text
from mindtune.data.buckets import Row, table


def bucket(row: Row, task: str) -> dict[str, Any]:
    """A bucket for --json: the number of its items, what cropping cuts off, and for Kontext the size of conditions."""
    report = {
        "height": row.size[0],
        "width": row.size[1],
        "pictures": row.count,
        "cropped_away_mean": row.cropped_mean,
        "cropped_away_most": row.cropped_most,
    }
    return {**report, "condition": row.condition} if task == "kontext" else report


def _row(bucket: dict[str, Any]) -> Row:
    size = (bucket["height"], bucket["width"])
    counts = (bucket["pictures"], bucket["cropped_away_mean"], bucket["cropped_away_most"])
    return Row(size, *counts, bucket.get("condition"))


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    is_pairs = report["kind"] == "pairs"
    names = " and ".join(map(printable, report["data"]))
    lines = [f"{names}: {report['found']} {'pairs' if is_pairs else 'images'}, {report['usable']} usable"]
    if report["without_condition"]:
        lines[0] += f", {report['without_condition']} of them without a condition"
    lines += report["notes"]
    too_long = [
        f"{item['name']}: {item['tokens']} tokens, {item['encoder']} reads {item['limit']}"
        for item in report["captions_too_long"]
    ]
    sections = {
        "cannot be used": report["problems"],
        "identical files": [" = ".join(names) for names in report["duplicates"]],
        "without a caption" + ("" if is_pairs else ", and no prompt is given"): report["without_caption"],
        "captions that are truncated": too_long,
    }
    for title, items in sections.items():
        if items:
            lines += [f"{title}: {len(items)}", indented_list(items)]
    if report["tokens_counted_with"] is None:
        lines.append("tokens of captions: not counted without --pretrained_model_name_or_path")
    lines.append(table([_row(entry) for entry in report["buckets"]]))
    text, latents = (size_text(report["cache_bytes"][what]) for what in ("text", "latents"))
    lines.append(f"disk for the cache ({report['cache_for']}): text {text}, with --cache_latents {latents} more")
    lines += report["shorter_captions"]
    free = report["free_bytes"]
    lines.append(f"free: {size_text(free)}" + (", too little" if sum(report["cache_bytes"].values()) > free else ""))
    lines.append("a run can start with this data" if report["can_start"] else "a run would not start with this data")
    return "\n".join(lines)
