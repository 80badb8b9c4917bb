"""Pushing to a Hub and loading from it, over HTTP, in fresh processes with an empty cache."""

import json
import os

import hub_server
import pytest
import tiny
import yaml


@pytest.fixture
def hub():
    with hub_server.running() as server:
        yield server


@pytest.fixture
def run(hub, tmp_path, fresh_processes):
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
            "PYTHONPATH": os.path.dirname(hub_server.__file__),
        }
        result = fresh_processes.run(code, environment)
        if not check:
            return result
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.fixture
def dense(tmp_path, tokenizer):
    """A dense checkpoint with a card and a licence."""
    folder = tmp_path / "dense"
    tiny.make_model("llama_gqa_biases").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = "---\nlicense: llama3.2\nlicense_name: kind\nlicense_link: LICENSE\ntags: [tiny]\n---\n# Dense\n"
    (folder / "README.md").write_text(card)
    (folder / "LICENSE").write_text("Be kind.\n")
    (folder / "NOTICE").write_text("Made by others.\n")
    return folder


PRUNE = """
import json, torch
from optimum_fwdprune import FwdPruner, PruningConfig
pruner = FwdPruner.from_pretrained({dense!r})
request = PruningConfig(kinds=["attention", "mlp"], scope="global", sparsity=0.3)
model = pruner.prune(request, torch.arange(96).view(4, 24))
"""

# The same without data, so that a command can name all of it.
BY_MAGNITUDE = """
from optimum_fwdprune import FwdPruner
pruner = FwdPruner.from_pretrained({dense!r})
pruner.prune(method="magnitude", scope="global", sparsity=0.3, reconstruction="none")
"""


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
        "request = PruningConfig(kinds=['attention', 'mlp'], scope='global', sparsity=0.3)\n"
        "model = pruner.prune(request, torch.arange(96).view(4, 24))\n"
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


def test_large_files_go_through_lfs_and_come_back(hub, run, dense):
    hub.large_from = 1000
    pushed = run(
        PRUNE.format(dense=str(dense)) + "pruner.push_to_hub('tester/large')\n"
        "print(json.dumps(model(torch.arange(12)[None]).logits.double().sum().item()))"
    )
    loaded = run(
        "import json, torch, optimum_fwdprune\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('tester/large')\n"
        "print(json.dumps(model(torch.arange(12)[None]).logits.double().sum().item()))",
        cache="fresh",
    )

    assert loaded == pushed
    assert hub.files["tester/large"]["model.safetensors"] in hub.objects.values()


def test_the_card_says_what_it_is_and_how_to_load_it(hub, run, dense):
    run(BY_MAGNITUDE.format(dense=str(dense)) + "pruner.push_to_hub('tester/Llama-tiny', private=True)\nprint('{}')")
    files = hub.files["tester/Llama-tiny"]
    card = files["README.md"].decode()
    data = yaml.safe_load(card.split("---")[1])

    assert (data["license"], data["license_name"], data["license_link"]) == ("llama3.2", "kind", "LICENSE")
    # A folder is no name that others could load.
    assert "base_model" not in data
    assert set(data["tags"]) == {"pruned", "optimum-fwdprune"}
    assert data["pipeline_tag"] == "text-generation" and data["library_name"] == "transformers"
    assert (files["LICENSE"], files["NOTICE"]) == (b"Be kind.\n", b"Made by others.\n")
    assert 'from_pretrained("tester/Llama-tiny", trust_remote_code=True)' in card
    assert "optimum-cli fwdprune prune -m MODEL OUTPUT --method magnitude --sparsity 0.3 --scope global" in card
    assert "`MODEL` is the dense model, here a folder named `dense`." in card
    assert "Built with Llama" in card and "![kept units by layer](kept_units.png)" in card
    assert files["kept_units.png"].startswith(b"\x89PNG")
    assert "The alignment and safety of the pruned model were not tested." in card
    plan = json.loads(files["fwdprune_plan.json"])
    assert plan["metadata"]["source"] == "dense"


def test_the_ways_to_load_that_the_card_shows_work(hub, run, dense):
    run(PRUNE.format(dense=str(dense)) + "pruner.push_to_hub('tester/Llama-tiny')\nprint('{}')")
    card = hub.files["tester/Llama-tiny"]["README.md"].decode()
    section = card.partition("## Load it")[2].partition("\n## ")[0]
    ways = [block.split("```")[0] for block in section.split("```python\n")[1:]]

    assert len(ways) == 3
    for number, way in enumerate(ways):
        run(way + "\nprint('{}')", cache=f"cache-{number}")


def test_figures_of_a_comparison_become_a_model_index(hub, run, dense):
    run(
        PRUNE.format(dense=str(dense)) + "from optimum_fwdprune.evaluation import *\n"
        "scores = [TaskScore('piqa', 'acc', 0.625, 0.03, 300)]\n"
        "pruner.comparison = Comparison([Evaluation('pruned', {'WikiText-2': TextLoss(20.0, 10)}, scores)])\n"
        "pruner.push_to_hub('tester/measured')\nprint('{}')"
    )
    card = hub.files["tester/measured"]["README.md"].decode()
    results = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]

    found = {each["dataset"]["name"]: each["metrics"][0] for each in results}
    assert found["piqa"]["type"] == "acc" and found["piqa"]["value"] == 0.625
    assert found["WikiText-2"]["value"] == pytest.approx(7.389, abs=1e-3)
    assert "| piqa, acc | 0.625 ± 0.030 |" in card


def test_branches_and_pull_requests(hub, run, dense):
    run(
        PRUNE.format(dense=str(dense)) + "pruner.push_to_hub('tester/branched', revision='half')\n"
        "pruner.push_to_hub('tester/branched', create_pr=True)\nprint('{}')"
    )

    assert hub.branches == ["tester/branched half"]
    commits = [request for request in hub.requests if "/commit/" in request]
    assert commits == [
        "POST /api/models/tester/branched/commit/half",
        "POST /api/models/tester/branched/commit/main?create_pr=1",
    ]


def test_what_is_pruned_from_the_hub_names_its_base(hub, run, dense):
    push = "from huggingface_hub import HfApi\nHfApi().create_repo('someone/dense')\n"
    push += f"HfApi().upload_folder(repo_id='someone/dense', folder_path={str(dense)!r})\n"
    run(push + BY_MAGNITUDE.format(dense="someone/dense") + "pruner.push_to_hub('tester/Llama-small')\nprint('{}')")
    files = hub.files["tester/Llama-small"]
    card = files["README.md"].decode()

    assert yaml.safe_load(card.split("---")[1])["base_model"] == "someone/dense"
    assert "optimum-cli fwdprune prune -m someone/dense OUTPUT" in card and files["LICENSE"] == b"Be kind.\n"


def test_pruned_models_and_trainers_push_like_dense_ones(hub, run, dense, tmp_path):
    """Without the pruner: what transformers itself uploads loads again, with the plugin and without it."""
    logits = "print(json.dumps(model.eval()(torch.arange(12)[None]).logits.double().sum().item()))\n"
    train = "from transformers import Trainer, TrainingArguments\nmodel.push_to_hub('tester/model')\n"
    train += "rows = [{'input_ids': row, 'labels': row} for row in torch.arange(96).view(4, 24)]\n"
    options = {"output_dir": str(tmp_path / "training"), "hub_model_id": "tester/trained", "use_cpu": True}
    options |= {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "push_to_hub": True}
    train += f"trainer = Trainer(model, TrainingArguments(**{options}), train_dataset=rows)\n"
    train += "trainer.train()\ntrainer.push_to_hub()\n"
    pushed = run(PRUNE.format(dense=str(dense)) + train + logits)
    load = "import json, torch\n{first}from transformers import AutoModelForCausalLM\n"
    load += "model = AutoModelForCausalLM.from_pretrained('tester/{name}', {options})\n" + logits
    plugin = run(load.format(first="import optimum_fwdprune\n", name="trained", options=""), cache="first")
    remote = run(load.format(first="", name="trained", options="trust_remote_code=True"), cache="second")
    models = [hub.files[f"tester/{name}"] for name in ("model", "trained")]

    assert pushed == plugin == remote
    assert all({"pruned_llama.py", "per_layer.py", "layout.py"} <= files.keys() for files in models)
    assert models[0]["model.safetensors"] != models[1]["model.safetensors"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"refuse_commits": True}, "503"),
        ({"refuse_objects": True, "large_from": 1000}, "403"),
        ({"token": "hf_another"}, "403"),
        ({"taken": {"tester/Llama-x"}}, "a dataset has this name; choose another one"),
    ],
)
def test_an_upload_that_fails_leaves_the_checkpoint_and_says_how_to_go_on(hub, run, dense, tmp_path, broken, message):
    vars(hub).update(broken)
    out = tmp_path / "out"
    command = ["optimum-cli", "fwdprune", "prune", "-m", str(dense), str(out), "--calibration", "builtin"]
    command += ["--n_samples", "4", "--seq_len", "32", "--push-to-hub", "tester/Llama-x"]
    start = f"import sys; sys.argv = {command!r}\nfrom optimum.commands.optimum_cli import main; main()"
    result = run(start, check=False)
    error = next(line for line in result.stderr.splitlines() if line.startswith("error"))

    assert result.returncode == 1 and message in error and "Traceback" not in result.stderr
    assert f"The checkpoint in {out} is complete: `hf upload tester/Llama-x {out}` tries again." in error
    assert "fwdprune_plan.json" not in hub.files.get("tester/Llama-x", {})
    # The server is well again.
    vars(hub).update({"refuse_commits": False, "refuse_objects": False, "token": None, "taken": set()})
    again = "from huggingface_hub import HfApi\nHfApi().create_repo('tester/Llama-x', exist_ok=True)\n"
    run(f"{again}HfApi().upload_folder(repo_id='tester/Llama-x', folder_path={str(out)!r})\nprint('{{}}')")
    assert {"model.safetensors", "README.md"} <= hub.files["tester/Llama-x"].keys()


def test_without_a_token_the_way_to_one_is_named(hub, run, dense):
    hub.token = "hf_another"
    start = "import os; del os.environ['HF_TOKEN']\n"
    result = run(start + PRUNE.format(dense=str(dense)) + "pruner.push_to_hub('tester/x')", check=False)

    assert result.returncode == 1 and "OSError: tester/x was not uploaded: " in result.stderr
    assert "401" in result.stderr or "hf auth login" in result.stderr


def test_the_command_uploads_what_it_saved(hub, run, dense, tmp_path):
    out = tmp_path / "out"
    command = ["optimum-cli", "fwdprune", "prune", "-m", str(dense), str(out), "--calibration", "builtin"]
    command += ["--n_samples", "4", "--seq_len", "32", "--push-to-hub", "tester/small", "--private"]
    command += ["--create-pr"]
    start = f"import sys; sys.argv = {command!r}\nfrom optimum.commands.optimum_cli import main; main()"
    result = run(start, check=False)

    assert result.returncode == 0, result.stderr
    assert f"Uploaded to {hub.url}/tester/small/discussions/1" in result.stdout and hub.private == {"tester/small"}
    assert "POST /api/models/tester/small/commit/main?create_pr=1" in hub.requests
    # A Llama licence asks for the name.
    assert 'requires that the name of a model made from it begins with "Llama"' in result.stderr
    local = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert "fwdprune/scores.safetensors" in local and local <= hub.files["tester/small"].keys()
