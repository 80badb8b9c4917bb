"""The table and the summary of `gpu.py`."""

from typing import Any

from gpu_device import GIB
from study import table


def summary(records: list[dict[str, Any]]) -> str:
    """One line: how many parts came to what."""
    counts = {status: sum(record["status"] == status for record in records) for status in ("ok", "failed", "not run")}
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def page(document: dict[str, Any]) -> str:
    """Everything that was measured, as Markdown."""
    environment, records = document["environment"], document["parts"]
    known = ", ".join(f"{name} {value}" for name, value in environment.items() if value is not None)
    lines = ["# Run on a device", "", f"{known}.", "", f"Parts: {summary(records)}.", ""]
    lines += [table(["group", "part", "status", "s", "peak GiB", "result"], [row(record) for record in records])]
    failures = [record for record in records if record["status"] == "failed"]
    if failures:
        lines += ["## Failures", ""]
    for record in failures:
        lines += [f"### {record['group']}: {record['part']}", "", "```", record["traceback"].rstrip(), "```", ""]
    return "\n".join(lines)


def row(record: dict[str, Any]) -> list[str]:
    """A part as cells."""
    peak = record.get("peak_bytes")
    return [
        record["group"],
        record["part"],
        record["status"],
        f"{record['seconds']:.1f}" if "seconds" in record else "",
        "" if peak is None else f"{peak / GIB:.2f}",
        result_of(record).replace("|", "\\|").replace("\n", " "),
    ]


def result_of(record: dict[str, Any]) -> str:
    """What came of a part, in words."""
    words = [record[name] for name in ("error", "reason", "note") if record.get(name)]
    if "overlap" in record:
        words.append(
            f"overlap {record['overlap']:.3f}, logits off by {record['logits_difference']:.2g}, "
            f"loss {record['loss']:.4f} ({record['reference_loss']:.4f} on the CPU)"
        )
    elif "loss" in record:
        words.append(f"loss {record['loss']:.4f}")
    if "seconds_by_stage" in record:
        peaks = record["peaks"]
        stages = [
            f"{stage} {seconds:.1f} s" + (f" {peaks[stage] / GIB:.1f} GiB" if peaks.get(stage) else "")
            for stage, seconds in record["seconds_by_stage"].items()
        ]
        words.append("; ".join(stages))
    elif record.get("peaks"):
        words.append("; ".join(f"{stage} {peak / GIB:.1f} GiB" for stage, peak in record["peaks"].items()))
    if "prefill" in record:
        prefill, decode = (1e3 * record[name]["median"] for name in ("prefill", "decode"))
        words.append(
            f"{record['parameters'] / 1e9:.2f} B parameters, prefill {prefill:.1f} ms, {decode:.2f} ms a token"
        )
    if "measured" in record:
        words.append(
            f"asked {record['asked']}, predicted {record['predicted']:.3f}, measured {record['measured']:.3f}"
        )
    return "; ".join(words)
