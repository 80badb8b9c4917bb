"""From a checkpoint to a GGUF file of four bits: the two commands of docs/how_to/laptop.md on a real model, measured.

    python benchmarks/laptop.py MODEL CALIBRATION_FILE EVALUATION_FILE [--sparsity 0.2] [--outtype q4_0]

Runs the commands and shows what they print. Then it compares the dense model with the pruned one: the size of their
GGUF files, their perplexity in transformers on the first windows of EVALUATION_FILE, and the tokens per second of
llama.cpp (`pip install xllamacpp`), which writes with one thread. Leave the machine idle while it runs.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from optimum.commands.optimum_cli import main as optimum_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

import optimum_fwdprune  # noqa: F401, which registers the pruned classes
from optimum_fwdprune.evaluation import perplexity


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from llama_cpp import llama_cpp


WINDOW, WINDOWS = 512, 8
PROMPT = "def fibonacci(n):"
NEW_TOKENS, REPEATS = 48, 5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--sparsity", default="0.2")
    parser.add_argument("--outtype", default="q4_0")
    parser.add_argument("--n_samples", default="128", help="calibration windows")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fwdprune-laptop-") as folder:
        files = {name: str(Path(folder) / f"{name}-{args.outtype}.gguf") for name in ("dense", "pruned")}
        pruned = str(Path(folder) / "pruned")
        request = ["--preset", "fast", "--sparsity", args.sparsity, "--for_gguf", args.outtype]
        texts = ["--calibration", args.calibration, "--n_samples", args.n_samples]
        command("prune", "-m", args.model, pruned, *request, *texts)
        for name, model in (("pruned", pruned), ("dense", args.model)):
            command("export", model, files[name], "--outtype", args.outtype)
        for name, model in (("dense", args.model), ("pruned", pruned)):
            size = Path(files[name]).stat().st_size / 1e6
            rates, text = written_by_llama_cpp(files[name])
            spread = f"{min(rates):.1f} to {max(rates):.1f}"
            print(
                f"{name}: {size:.1f} MB, perplexity {perplexity_of(model, args.evaluation):.1f} in transformers, "
                f"{statistics.median(rates):.1f} tokens per second ({spread}) in llama.cpp, which writes {text!r}",
                flush=True,
            )


def command(*words):
    """Run a command in this process, and show it with the time that it takes."""
    print("$ optimum-cli fwdprune", *words, flush=True)
    sys.argv = ["optimum-cli", "fwdprune", *words]
    start = time.perf_counter()
    optimum_cli()
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)


def perplexity_of(model, file):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(Path(file).read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    windows = tokens[: WINDOWS * WINDOW].view(WINDOWS, WINDOW)
    return perplexity(AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval(), windows)


def written_by_llama_cpp(file):
    """Tokens per second of several runs, and the start of the text."""
    with llama_cpp(file) as ask:
        answers = [ask(PROMPT, NEW_TOKENS) for _ in range(REPEATS)]
    return [answer["timings"]["predicted_per_second"] for answer in answers], answers[0]["content"][:60]


if __name__ == "__main__":
    main()
