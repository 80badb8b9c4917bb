"""What scoring and surgery cost, as ratios within one run.

    python benchmarks/cost.py
    python benchmarks/cost.py --model FOLDER --text CALIBRATION_TEXT  # presets of a real model alone

The first uses a model of SmolLM2-135M's shape with random weights. Targets: scoring at most 1.2 x the plain forward
passes over the same tokens; a mask for every sequence at most 1.15 x the plain forward pass of the batch; surgery's
peak at most the dense model plus one layer; the presets at most 2, 4.5 and 8 x the plain forward passes. Presets
remove 40 % and calibrate on 128 windows of 256 tokens, in bfloat16. Their ratios are of processor time, and plain
forward passes are those of the base model, without its head.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_fwdprune import Calibration, FwdPruner, PruningConfig, find_sites
from optimum_fwdprune.cutting.surgery import prune_model
from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.forward.gates import gated
from optimum_fwdprune.forward.gathering import collect_statistics
from optimum_fwdprune.forward.losses import model_nll
from optimum_fwdprune.loading.subject import Subject
from optimum_fwdprune.report import render_table


SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


# Methods whose scoring is timed, each with the reconstruction that it was published with.
RECONSTRUCTIONS = {"wanda_sp": "none", "flap": "bias"}


@torch.no_grad()
def scoring_ratios(model, repeats, windows=8, seq_len=256):
    """Yield (method, median, lowest, highest) of scoring time over the time of the plain forward passes."""
    calibration = Calibration(torch.randint(0, 49152, (windows, seq_len)))

    def plain():
        for input_ids, *_ in calibration.batches(8):
            model.base_model(input_ids=input_ids, use_cache=False)

    for method in RECONSTRUCTIONS:
        pruner, config = (
            FwdPruner(model),
            PruningConfig(method=method, kinds=["attention", "mlp"], reconstruction=RECONSTRUCTIONS[method]),
        )

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
        ratios.append(_seconds(lambda: collect_statistics(Subject(model, sites), calibration, 8)) / _seconds(plain))
    yield "statistics alone", ratios


@torch.no_grad()
def gate_ratios(model, repeats, masks=2, windows=8, seq_len=128):
    """Return the time of a forward pass with a mask for every sequence over that of the plain one, same batch."""
    sites = find_sites(model)
    input_ids = torch.randint(0, 49152, (windows, seq_len)).repeat(masks, 1)

    def plain():
        model(input_ids=input_ids, use_cache=False)

    def masked():
        drawn = {site.key: (torch.rand(masks, site.num_units) > 0.4).float() for site in sites}
        with gated(sites, {key: mask.repeat_interleave(windows, 0) for key, mask in drawn.items()}):
            plain()

    plain(), masked()
    return [_seconds(masked) / _seconds(plain) for _ in range(repeats)]


def learning_ratios(model, repeats, parametrization, steps=2):
    """Return the time of learning steps, all of it, over that of the plain forward passes of their batches."""
    calibration = Calibration(torch.randint(0, 49152, (8 * steps, 128)))
    options = {
        "masks_per_step": 2,
        "windows_per_step": 8,
        "batch_size": 16,
        "metric": "random",
        "kinds": ["attention", "mlp"],
    }

    def learn(steps):
        request = PruningConfig(method="policy_gradient", parametrization=parametrization, steps=steps, **options)
        FwdPruner(model).score(request, calibration)

    @torch.no_grad()
    def plain():
        for windows in calibration.input_ids.split(8):
            model_nll(model, windows.repeat(2, 1))

    learn(0), plain()
    return [(_seconds(lambda: learn(steps)) - _seconds(lambda: learn(0))) / _seconds(plain) for _ in range(repeats)]


# Presets with their targets: processor time over that of the plain forward passes.
PRESETS = {"fast": 2.0, "balanced": 4.5, "best": 8.0}


@torch.no_grad()
def preset_ratios(model, repeats, preset, calibration):
    """Return the processor time of prune(), all of it, over that of the plain forward passes over its tokens."""

    def plain():
        for input_ids, *_ in calibration.batches(8):
            model.base_model(input_ids=input_ids, use_cache=False)

    def prune():
        FwdPruner(model).prune(preset, calibration, sparsity=0.4, batch_size=8, inplace=False)

    plain()
    return [_processor_seconds(prune) / _processor_seconds(plain) for _ in range(repeats)]


def preset_rows(model, repeats, calibration):
    """Return the rows of the table for all presets."""
    rows = []
    for preset, target in PRESETS.items():
        ratios = preset_ratios(model, repeats, preset, calibration)
        rows.append((f"prune(), {preset} / plain forwards", *_median_and_range(ratios), f"<= {target:.2f}"))
        print(rows[-1], flush=True)
    return rows


def surgery_peak(model):
    """Return the peak of surgery above the dense model, in layers, or `None` where the system does not tell."""
    pruner = FwdPruner(model)
    pruner.prune(method="random", reconstruction="none", kinds=["attention", "mlp"], sparsity=0.4, inplace=False)
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
    prune_model(Subject(model, sites), plan)
    return (_memory("VmHWM") - before) / layer_bytes


def _seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _processor_seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


def _median_and_range(values):
    return f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"


def _memory(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", help="folder of a model, for the costs of the presets alone")
    parser.add_argument("--text", help="file with the calibration text for --model")
    args = parser.parse_args()
    repeats = args.repeats
    torch.manual_seed(0)
    if args.model is not None:
        pruner = FwdPruner.from_pretrained(args.model, dtype=torch.bfloat16)
        request = PruningConfig(calibration=args.text, n_samples=128, seq_len=256)
        calibration = load_calibration(request, pruner.model, pruner.tokenizer)
        _show(preset_rows(pruner.model, min(repeats, 3), calibration), repeats)
        return
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2_135M)).eval()

    rows = []
    for name, ratios in scoring_ratios(model, repeats):
        rows.append((f"{name} / plain forwards", *_median_and_range(ratios), "<= 1.20"))
    gates = gate_ratios(model, repeats)
    rows.append(("a mask per sequence / plain forward", *_median_and_range(gates), "<= 1.15"))
    for parametrization in ("unit", "ratio"):
        ratios = learning_ratios(model, repeats, parametrization)
        rows.append((f"a step of learning, {parametrization} / plain forwards", *_median_and_range(ratios), ""))
    tokens = Calibration(torch.randint(0, 49152, (128, 256)))
    rows += preset_rows(model.to(torch.bfloat16), min(repeats, 3), tokens)
    peak = surgery_peak(model.float())
    rows.append(("surgery, peak above dense / a layer", "unknown" if peak is None else f"{peak:.2f}", "", "<= 1.00"))
    _show(rows, repeats)


def _show(rows, repeats):
    print(render_table(("cost", "median", "range", "target"), rows))
    print(f"{repeats} repeats, {torch.get_num_threads()} threads, torch {torch.__version__}.")


if __name__ == "__main__":
    main()
