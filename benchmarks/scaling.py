"""What several processes gain: the time of one over the time of two, for everything that is divided among them.

    python benchmarks/scaling.py

Launches itself with one and with two processes of one thread each, in turns, so that a busy machine slows both. The
model has SmolLM2-135M's layers, eight of them, with random weights: times do not depend on the weights. On a machine
that others use, two processes get more of it than one, so the ratio of seconds says less than that of processor time:
what one process alone spends over what the busiest of two does. The load is printed as well.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_fwdprune import Calibration, FwdPruner, PruningConfig
from optimum_fwdprune.report import render_table
from optimum_fwdprune.runs import ranks


SIZES = {
    "vocab_size": 8192,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "bos_token_id": 1,
}
NONE = {"reconstruction": "none"}
# Stage -> fields of a request in which it takes most of the time.
STAGES = {
    "statistics (wanda_sp)": NONE,
    "text from the model": {"calibration": "self", "n_samples": 32, "seq_len": 48, "batch_size": 2, **NONE},
    "draws (mini_llm)": {"method": "mini_llm", "draws": 12, "windows_per_draw": 2, **NONE},
    "masks (policy_gradient)": {"method": "policy_gradient", "steps": 8, **NONE},
    "candidates (search)": {"scope": "search", "search_windows": 60, **NONE},
    "sequential least squares": {},
}


def measure(output):
    """Time every stage in this process, which starts and ends it together with the others."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    tokens = torch.randint(0, SIZES["vocab_size"], (32, 128), generator=torch.Generator().manual_seed(1))
    seconds = {}
    for name, fields in STAGES.items():
        dataset = None if "calibration" in fields else Calibration(tokens)
        ranks.from_main(lambda: None)
        start, worked = time.perf_counter(), time.process_time()
        FwdPruner(model).prune(
            PruningConfig(**{"sparsity": 0.3, "kinds": ["attention", "mlp"], **fields}), dataset, inplace=False
        )
        own = torch.tensor(time.process_time() - worked)
        # Of the process that had most to do.
        busiest = float(ranks.gathered(own).max())
        seconds[name] = time.perf_counter() - start, busiest
    if ranks.is_main():
        Path(output).write_text(json.dumps(seconds))


def launch(processes):
    """Return the seconds of every stage in so many processes."""
    launcher = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--multi_gpu", "--num_processes", str(processes), "--main_process_port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "seconds.json"
        command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--measure", str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return json.loads(output.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="Launches of each kind.")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure)
    one, two, loads = [], [], []
    for _ in range(args.repeats):
        for found, processes in ((one, 1), (two, 2)):
            loads.append(os.getloadavg()[0])
            found.append(launch(processes))
            print(
                f"{processes} process(es): {sum(wall for wall, _ in found[-1].values()):.0f} s, load {loads[-1]:.1f}",
                flush=True,
            )
    rows = []
    for name in STAGES:
        alone, together = ([each[name] for each in found] for found in (one, two))
        row = [name]
        for kind in range(2):
            ratios = [single[kind] / double[kind] for single, double in zip(alone, together)]
            row.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        row += [f"{statistics.median(wall for wall, _ in found):.1f}" for found in (alone, together)]
        rows.append(row)
    print(render_table(["Stage", "ratio of seconds", "of processor time", "1 process, s", "2 processes, s"], rows))
    print(f"{os.cpu_count()} cores, load {min(loads):.1f} to {max(loads):.1f} in front of a launch.")


if __name__ == "__main__":
    main()
