"""What scoring, surgery and importing cost, as ratios within one run.

    python benchmarks/cost.py

Uses a model of SmolLM2-135M's shape with random weights: times do not depend on the weights. Targets: scoring at most
1.2 x the plain forward passes over the same tokens; surgery's peak at most the dense model plus one layer; importing
the package under 50 ms and without torch.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_fwdprune import Calibration, FwdPruner, PruningConfig, find_sites
from optimum_fwdprune.report import render_table
from optimum_fwdprune.statistics import collect_statistics
from optimum_fwdprune.surgery import prune_model


SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@torch.no_grad()
def scoring_ratios(model, repeats, windows=8, seq_len=256):
    """Yield (method, median, lowest, highest) of scoring time over the time of the plain forward passes."""
    calibration = Calibration(torch.randint(0, 49152, (windows, seq_len)))

    def plain():
        for input_ids, _ in calibration.batches(8):
            model.base_model(input_ids=input_ids, use_cache=False)

    for method in ("wanda_sp", "flap"):
        pruner, config = FwdPruner(model), PruningConfig(method=method)

        def score(pruner=pruner, config=config):
            pruner.score(config, calibration)

        plain(), score()
        ratios = []
        for _ in range(repeats):
            # Interleaved, so that a busy machine slows both.
            ratios.append(_seconds(score) / _seconds(plain))
        yield f"{method}, whole of score()", ratios
    ratios = []
    sites = find_sites(model)
    for _ in range(repeats):
        ratios.append(_seconds(lambda: collect_statistics(model, sites, calibration, 8)) / _seconds(plain))
    yield "statistics alone", ratios


def surgery_peak(model):
    """Return the peak of surgery above the dense model, in layers, or `None` where the system does not tell."""
    pruner = FwdPruner(model)
    pruner.prune(PruningConfig(method="random", sparsity=0.4), inplace=False)
    plan = pruner.plan
    sites = find_sites(model, plan.attention_unit)
    del pruner
    layer = model.model.layers[0]
    layer_bytes = sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _memory("VmRSS")
    prune_model(model, sites, plan)
    return (_memory("VmHWM") - before) / layer_bytes


def import_milliseconds(repeats):
    """Return milliseconds that importing the package takes, each in a fresh process that must not load torch."""
    code = (
        "import sys, time; start = time.perf_counter(); import optimum_fwdprune; "
        "print(1000 * (time.perf_counter() - start)); assert 'torch' not in sys.modules"
    )
    return [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(repeats)
    ]


def _seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _memory(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_135M)).eval()

    rows = []
    for name, ratios in scoring_ratios(model, repeats):
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append((f"{name} / plain forwards", f"{statistics.median(ratios):.2f}", spread, "<= 1.20"))
    peak = surgery_peak(model)
    rows.append(("surgery, peak above dense / a layer", "unknown" if peak is None else f"{peak:.2f}", "", "<= 1.00"))
    times = import_milliseconds(repeats)
    rows.append(("import, ms", f"{statistics.median(times):.1f}", f"{min(times):.1f} to {max(times):.1f}", "< 50"))
    print(render_table(("cost", "median", "range", "target"), rows))
    print(f"{repeats} repeats, {torch.get_num_threads()} threads, torch {torch.__version__}.")


if __name__ == "__main__":
    main()
