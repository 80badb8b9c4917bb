"""Two processes recover a model as one does: `accelerate launch` with gloo on the CPU."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner


MODES = ["full", "distill"]
SCRIPT = Path(__file__).parents[1] / "scripts" / "recover_ddp.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A dense model, the same pruned, and tokens."""
    folder = tmp_path_factory.mktemp("processes")
    tokens = torch.randint(0, tiny.VOCAB, (64, 16), generator=torch.Generator().manual_seed(5))
    (folder / "tokens.json").write_text(json.dumps(tokens.tolist()))
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"), tokenizer)
    pruner.model.save_pretrained(folder / "dense")
    pruner.prune(tiny.request(sparsity=0.4, scope="global", attention_unit="kv_group"), tokens)
    pruner.save_pretrained(folder / "pruned")
    for processes in (1, 2):
        run(folder, processes)
    return folder


def run(folder, processes):
    script = [str(SCRIPT), str(folder / "pruned"), str(folder / str(processes)), *MODES]
    if processes == 1:
        with pytest.MonkeyPatch.context() as here:
            here.setattr(sys, "argv", script)
            runpy.run_path(script[0])
    else:
        # `accelerate launch` as for several GPUs, which starts torchrun; `use_cpu` then takes gloo.
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"]
        command = [sys.executable, *launch, "--num_processes", str(processes), "--main_process_port", "0", *script]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_end_where_one_does(folder, mode):
    one, two = (json.loads((folder / f"{processes}-{mode}.json").read_text()) for processes in (1, 2))
    models = [AutoModelForCausalLM.from_pretrained(folder / f"{processes}-{mode}") for processes in (1, 2)]
    before = AutoModelForCausalLM.from_pretrained(folder / "pruned")

    assert (one["processes"], two["processes"]) == (1, 2)
    # Up to the order in which numbers are added.
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-4)
    moved = 0.0
    for name, value in models[0].state_dict().items():
        assert torch.allclose(value, models[1].state_dict()[name], atol=1e-4), name
        moved = max(moved, float((value - before.state_dict()[name]).abs().max()))
    assert moved > 1e-2
    # What the Trainer left on the way is of one process, and whole.
    assert (folder / f"2-{mode}-training" / "checkpoint-4").is_dir()
