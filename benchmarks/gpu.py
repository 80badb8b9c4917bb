"""What CPUs cannot show, in one run of at most eight minutes on a GPU: every request, memory, speed, and what fails.

    python benchmarks/gpu.py [--device cuda] [--minutes 8] [--output benchmarks/results/gpu]

Needs nothing but torch, transformers and this package: models are made from configs, texts are random tokens. Every
request runs on tiny models of several layouts, in bfloat16, float16 and float32, beside the same request on the CPU;
with layers offloaded, and on two devices where there are two; the presets run on models of LLaMA-2-7B's and
Llama-3-8B's shapes, with all of the memory and with that of a 24 GB card; pruned models are timed.

A part that fails is recorded with its traceback and the others still run, the most informative ones first; parts that
would not fit into the time that is left are recorded as not run. Results are written after every part, as JSON and as
a table in Markdown; `--continue` goes on from them. The exit status is 1 where a part failed.
"""

import argparse
import functools
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_requests
import torch
from gpu_device import Device
from gpu_large import LargeParts, pruning_parts, speed_parts
from gpu_report import page, summary
from gpu_requests import LAYOUTS, NOT_STREAMED, OFFLOADED, placements
from gpu_run import Part, quiet, run_parts
from requests_for_devices import REQUESTS

from optimum_fwdprune.files import write_text_atomically


# A tiny model's request, on one H100.
TINY_SECONDS = 3.0


def parts_for(device: Device, tiny: bool) -> list[Part]:
    """Everything there is to try, the most informative first."""
    large = LargeParts(device, tiny)
    pruning = [Part("pruning", name, *rest) for name, rest in pruning_parts(large).items()]
    speed = [Part("speed", name, *rest) for name, rest in speed_parts(large).items()]
    first = _requests(device, "requests", "llama", torch.bfloat16)
    offloading = _offloading(device)
    most = [part for part in offloading if part.name.endswith((", sequential", ", none"))]
    rest = [part for part in offloading if part not in most]
    exact = _requests(device, "requests", "llama", torch.float32)
    later = [*exact, *_requests(device, "requests", "llama", torch.float16)]
    for dtype in (torch.bfloat16, torch.float16):
        for layout in LAYOUTS:
            later += _requests(device, "other layouts", layout, dtype) if layout != "llama" else []
    parts = [*first, *most, *pruning[:3], *speed, *_others(device), *rest, *pruning[3:5], *later, *pruning[5:]]
    return [replace(part, seconds=min(part.seconds, TINY_SECONDS)) for part in parts] if tiny else parts


def _requests(device: Device, group: str, layout: str, dtype: torch.dtype) -> list[Part]:
    run = functools.partial(gpu_requests.request, device, layout, dtype)
    kind = str(dtype).removeprefix("torch.")
    return [Part(group, f"{layout}, {kind}, {name}", TINY_SECONDS, functools.partial(run, name)) for name in REQUESTS]


def _offloading(device: Device) -> list[Part]:
    return [
        Part(
            "offloading",
            f"{placement}, {name}",
            TINY_SECONDS,
            functools.partial(gpu_requests.offloaded, device, placement, name),
        )
        for placement in placements(device)
        for name in OFFLOADED
        if placement != "low_memory" or name not in NOT_STREAMED
    ]


def _others(device: Device) -> list[Part]:
    others = {
        "device_map, saved and loaded": gpu_requests.device_map_auto,
        "padded tokens": gpu_requests.padded,
        "twice the same": gpu_requests.repeated,
        "random state": gpu_requests.random_state,
    }
    return [Part("requests", name, 2 * TINY_SECONDS, functools.partial(run, device)) for name, run in others.items()]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=str(accelerator or "cpu"), help="By default the accelerator there is.")
    parser.add_argument("--minutes", type=float, default=8.0, help="Time for all parts together.")
    parser.add_argument("--output", default="benchmarks/results/gpu", help="Results, without .json and .md.")
    parser.add_argument("--only", default="", help="Parts whose group and name hold this text.")
    parser.add_argument("--tiny", action="store_true", help="Tiny shapes in place of 7B, to try this script.")
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="Keep the results of parts that ran before."
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args, start = parse(arguments), time.perf_counter()
    device = Device(args.device)
    files = [Path(f"{args.output}{suffix}") for suffix in (".json", ".md")]
    records: list[dict[str, Any]] = []
    if args.go_on and files[0].exists():
        before = json.loads(files[0].read_text(encoding="utf-8"))["parts"]
        records += [record for record in before if record["status"] != "not run"]
    document = {"environment": device.environment(), "arguments": vars(args), "parts": records}

    def write() -> None:
        document["summary"] = summary(records)
        document["seconds"] = time.perf_counter() - start
        write_text_atomically(files[0], json.dumps(document, indent=1) + "\n")
        write_text_atomically(files[1], page(document))

    done = {(record["group"], record["part"]) for record in records}
    parts = [part for part in parts_for(device, args.tiny) if args.only in f"{part.group}: {part.name}"]
    parts = [part for part in parts if (part.group, part.name) not in done]
    write()
    with quiet():
        answers = run_parts(parts, device, 60 * args.minutes, records, write)
    if not answers:
        # A process whose device was lost gets it back only by starting anew.
        left = args.minutes - (time.perf_counter() - start) / 60
        print(f"The device does not answer any more; going on in a new process for {left:.1f} minutes.", flush=True)
        options = ["--device", args.device, "--output", args.output, "--only", args.only, "--minutes", str(left)]
        options += ["--continue", *(["--tiny"] if args.tiny else [])]
        os.execv(sys.executable, [sys.executable, __file__, *options])
    print(page(document))
    print(f"{summary(records)}; {files[0]} and {files[1]}, {time.perf_counter() - start:.0f} s.")
    return int(any(record["status"] == "failed" for record in records))


if __name__ == "__main__":
    sys.exit(main())
