"""A model of LLaMA-2-7B's shape pruned with low_memory=True: peak memory, and the seconds of each stage.

    python benchmarks/large_model.py [--folder DISK] [--windows 4] [--tokens 64]

Writes a checkpoint of random bfloat16 weights (13.5 GB, never in memory as a whole) into a temporary folder below
--folder, prunes half of what is prunable with Wanda-sp on a few windows of random tokens, each request in a fresh
process, and removes everything again. It asks for 30 GB of free disk first. Targets: peak resident memory 3 GiB, and
4 GiB with least squares. Results are kept in --results; the table is printed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from study import table
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.files import save_weights_atomically, write_text_atomically


SIZES = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
GIB = 2**30
NEEDED = 30e9
# Name -> (request, aim in GiB).
REQUESTS = {
    "wanda_sp": ({"reconstruction": "none"}, 3),
    "wanda_sp, independent least squares": (
        {"reconstruction": "least_squares", "reconstruction_order": "independent"},
        4,
    ),
    "wanda_sp, sequential least squares": ({"reconstruction": "least_squares"}, 4),
}
# Beside what every request has in common.
COMMON = {"sparsity": 0.5, "kinds": ["attention", "mlp"], "skip_layers": [], "batch_size": 4}


def make_checkpoint(folder, layers):
    """Write random weights shard by shard: one per layer, and one for embeddings, norm and head."""
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": layers}, vocab_size=32000, dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    parts = {}
    for name in shapes:
        number = int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0
        parts.setdefault(number, []).append(name)
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    for number, names in sorted(parts.items()):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: random_weights(shapes[name], generator) for name in names}
        save_weights_atomically(folder / file, tensors)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    write_text_atomically(folder / "model.safetensors.index.json", json.dumps(index))


def random_weights(shape, generator):
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    # Normal enough, and a few times faster than drawing normal numbers.
    values = torch.empty(shape, dtype=torch.bfloat16).uniform_(-1, 1, generator=generator)
    return values.mul_(0.02 * 3**0.5)


@contextmanager
def watched_memory():
    """Yield a dictionary that holds, once the context is left, the peaks of this process's resident memory in bytes:
    `rss`, and `anonymous`, without what is mapped from files, which the system takes back when it needs to."""
    process, peaks, done = psutil.Process(), {"rss": 0, "anonymous": 0}, threading.Event()

    def sample():
        while not done.wait(0.02):
            memory = process.memory_info()
            peaks["rss"] = max(peaks["rss"], memory.rss)
            peaks["anonymous"] = max(peaks["anonymous"], memory.rss - getattr(memory, "shared", 0))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def prune(name, folder, output, windows, tokens):
    """Prune in this process and print what it took as JSON."""
    with watched_memory() as peaks:
        seconds, start = {}, time.perf_counter()
        pruner = FwdPruner.from_pretrained(folder, low_memory=True, offload_folder=Path(output).parent)
        seconds["load"] = time.perf_counter() - start
        ids = torch.randint(32000, (windows, tokens), generator=torch.Generator().manual_seed(1))
        pruner.prune(PruningConfig(**{**COMMON, **REQUESTS[name][0]}), ids)
        start = time.perf_counter()
        pruner.save_pretrained(output)
        seconds |= pruner.report.seconds | {"save": time.perf_counter() - start}
    report = pruner.report
    result = {
        "request": REQUESTS[name][0],
        "tokens": windows * tokens,
        "peak_rss": peaks["rss"],
        "peak_anonymous": peaks["anonymous"],
        "seconds": seconds,
        "removed": report.removed_parameters / report.prunable_parameters,
        "bytes": [report.bytes_before, report.bytes_after],
        "masked_difference": report.masked_difference,
    }
    print(json.dumps(result))


def measure(args):
    parent = Path(args.folder)
    free = shutil.disk_usage(parent).free
    if free < NEEDED:
        sys.exit(f"{parent.absolute()} has {free / 1e9:.0f} GB free, and this takes 30. Name another --folder.")
    results = Path(args.results)
    found = json.loads(results.read_text()) if results.exists() else {}
    with tempfile.TemporaryDirectory(prefix="fwdprune-large-", dir=parent) as folder:
        dense = Path(folder) / "dense"
        start = time.perf_counter()
        make_checkpoint(dense, args.layers)
        print(f"wrote the checkpoint in {time.perf_counter() - start:.0f} s", flush=True)
        for name in args.requests:
            output = Path(folder) / "pruned"
            command = [sys.executable, __file__, "--windows", str(args.windows), "--tokens", str(args.tokens)]
            ran = subprocess.run(
                [*command, "--prune", name, str(dense), str(output)], stdout=subprocess.PIPE, text=True, check=True
            )
            found[name] = json.loads(ran.stdout.splitlines()[-1]) | {"layers": args.layers}
            write_text_atomically(results, json.dumps(found, indent=1) + "\n")
            shutil.rmtree(output)
            print(name, json.dumps(found[name]), flush=True)
    print(report(found))


def report(found):
    stages = ["load", "score", "allocate", "reconstruct", "surgery", "verify", "save"]
    rows = [
        [
            name,
            str(cell["layers"]),
            f"{cell['peak_rss'] / GIB:.2f} (aim {REQUESTS[name][1]})",
            f"{cell['peak_anonymous'] / GIB:.2f}",
            *(f"{cell['seconds'].get(stage, 0):.0f}" for stage in stages),
        ]
        for name, cell in found.items()
    ]
    return table(
        ["request", "layers", "peak GiB", "of which not mapped files", *(f"{stage}, s" for stage in stages)], rows
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", default=".", help="Where there is disk.")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"], help="Fewer, to try this script.")
    parser.add_argument("--requests", nargs="*", default=list(REQUESTS), choices=list(REQUESTS))
    parser.add_argument("--results", default="benchmarks/results/large_model.json")
    parser.add_argument("--prune", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prune:
        name, folder, output = args.prune
        prune(name, folder, output, args.windows, args.tokens)
    else:
        measure(args)


if __name__ == "__main__":
    main()
