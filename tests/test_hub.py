"""Pushing to a Hub and loading from it, over HTTP, in fresh processes with an empty cache."""

import json
import os
import subprocess
import sys

import hub_server
import pytest
import tiny


@pytest.fixture
def hub():
    with hub_server.running() as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """Run code in a process whose Hub is the loopback one; returns what it prints as JSON."""

    def run(code, cache="cache", check=True):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / cache),
            "HF_TOKEN": "hf_dummy",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": os.path.dirname(__file__),
        }
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
        if not check:
            return result
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run


def test_a_request_goes_to_the_hub_and_comes_back(hub, run):
    found = run(
        "import json\n"
        "from optimum_fwdprune import PruningConfig\n"
        "config = PruningConfig(method='flap', sparsity=0.4, skip_layers=[0])\n"
        "config.push_to_hub('tester/request', private=True)\n"
        "again = PruningConfig.from_pretrained('tester/request')\n"
        "print(json.dumps([type(again).__name__, again == config]))\n"
    )

    assert found == ["FlapConfig", True]
    assert list(hub.files["tester/request"]) == ["fwdprune_config.json"] and hub.private == {"tester/request"}


def test_a_pruned_model_goes_to_the_hub_and_loads_in_a_fresh_process(hub, run, tokenizer, tmp_path):
    tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    logits = "print(json.dumps(model(torch.arange(12)[None]).logits.double().sum().item()))\n"
    pushed = run(
        "import json, torch\n"
        "from optimum_fwdprune import FwdPruner, PruningConfig\n"
        f"pruner = FwdPruner.from_pretrained({str(tmp_path / 'dense')!r})\n"
        "model = pruner.prune(PruningConfig(scope='global', sparsity=0.3), torch.arange(96).view(4, 24))\n"
        "pruner.push_to_hub('tester/pruned')\n" + logits
    )
    load = "import json, torch\n{first}from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    load += "model = AutoModelForCausalLM.from_pretrained('tester/pruned', {options})\n"
    load += "AutoTokenizer.from_pretrained('tester/pruned', {options})\n" + logits
    plugin = run(load.format(first="import optimum_fwdprune\n", options=""), cache="first")
    remote = run(load.format(first="", options="trust_remote_code=True"), cache="second")

    assert plugin == remote == pushed
    assert {"model.safetensors", "fwdprune_plan.json", "pruned_llama.py"} <= hub.files["tester/pruned"].keys()

    command = "import sys; sys.argv = ['optimum-cli', 'fwdprune', 'inspect', 'tester/pruned']\n"
    shown = run(command + "from optimum.commands.optimum_cli import main; main()", cache="third", check=False)
    assert shown.returncode == 0 and "llama pruned by wanda_sp" in shown.stdout, shown.stderr


def test_a_hub_out_of_order_is_an_error_of_the_hub(hub, run):
    hub.refuse_commits = True
    result = run("from optimum_fwdprune import PruningConfig; PruningConfig().push_to_hub('tester/x')", check=False)

    assert result.returncode == 1 and "503" in result.stderr
    assert hub.files["tester/x"] == {}
