"""Several processes end where one does: `accelerate launch` with gloo on the CPU, all cases in one launch."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from scripts import prune_in_ranks
from transformers import AutoModelForCausalLM

from optimum_fwdprune import FwdPruner, PruningPlan
from optimum_fwdprune.files import load_tensors
from optimum_fwdprune.loading import opening, placement
from optimum_fwdprune.loading.offloading import read_parameter
from optimum_fwdprune.loading.placement import placed
from optimum_fwdprune.runs import ranks
from optimum_fwdprune.runs.shelves import Shelf
from optimum_fwdprune.scoring.scores import Scores


# Sums over tokens in another order, in float32; refitted weights come out of systems that amplify it.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}
OF_LAYERS = "statistics-by-layer"
WEIGHTS = {"rtol": 5e-3, "atol": 5e-4}

# Seconds. All cases take one minute or two; processes that wait for each other never end.
LONGEST_LAUNCH = 480


def cases(*without):
    """Parametrizes a test with all cases and the numbers of processes that they run in, except for some."""
    pairs = [(count, name) for count in (2, 3) for name in prune_in_ranks.cases_in(count) if name not in without]
    return pytest.mark.parametrize(("folders", "name"), pairs, indirect=["folders"])


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Launches so many processes, once, and returns the folder that they wrote to."""

    @functools.cache
    def launched(processes):
        folder = tmp_path_factory.mktemp("ranks")
        launch(processes, prune_in_ranks.__file__, folder)
        return folder

    return launched


@pytest.fixture(params=[2, 3])
def folders(request, launched):
    """What each process of a launch wrote, one folder each."""
    return [launched(request.param) / str(rank) for rank in range(request.param)]


def launch(processes, *arguments):
    # `accelerate launch` as for several GPUs, which starts torchrun; on a CPU gloo is taken.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--num_processes", str(processes), "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen([*command, *map(str, arguments)], env=environment, start_new_session=True, **pipes)
    try:
        output, errors = launcher.communicate(timeout=LONGEST_LAUNCH)
    finally:
        # Processes that wait for each other would outlive their launcher.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    assert launcher.returncode == 0, errors[-3000:]
    return subprocess.CompletedProcess(command, launcher.returncode, output, errors)


@pytest.fixture(scope="module")
def alone():
    """What one process ends with, made when it is asked for."""
    made = {}
    return lambda name: made.setdefault(name, prune_in_ranks.run(name))


@cases("speedup")
def test_every_process_ends_where_one_alone_does(folders, alone, name):
    expected, _ = alone(name)
    scores = [Scores.load(folder / f"{name}.safetensors") for folder in folders]
    for folder, found in zip(folders, scores):
        assert PruningPlan.load(folder / f"{name}.json").kept == expected.plan.kept
        assert torch.equal(found.calibration.input_ids, expected.scores.calibration.input_ids)
        for key, values in expected.scores.values.items():
            torch.testing.assert_close(found.values[key], values, **TOLERANCE)
        for key, statistics in expected.scores.statistics.items():
            assert found.statistics[key].count == statistics.count
            torch.testing.assert_close(found.statistics[key].mean, statistics.mean, **TOLERANCE)
            torch.testing.assert_close(found.statistics[key].variance, statistics.variance, **TOLERANCE)
        weights, _ = load_tensors(folder / f"{name}.weights")
        for parameter, _ in expected.model.named_parameters():
            torch.testing.assert_close(weights[parameter], read_parameter(expected.model, parameter).data, **WEIGHTS)


def test_processes_take_gauss_newton_steps_together(folders):
    """Of three processes one holds out no window."""
    for folder in folders:
        found = PruningPlan.load(folder / "sources.json").metadata["reconstructed"]
        # The first MLP reads what it read in the dense model.
        assert found["0.mlp"]["sources_refitted"]


@cases()
def test_processes_agree_bit_for_bit(folders, name):
    plans = [json.loads((folder / f"{name}.json").read_text()) for folder in folders]
    files = [load_tensors(folder / f"{name}.weights")[0] for folder in folders]
    scores = [Scores.load(folder / f"{name}.safetensors") for folder in folders]
    for plan, weights, found in zip(plans[1:], files[1:], scores[1:]):
        assert plan == plans[0]
        assert all(torch.equal(weights[key], values) for key, values in files[0].items())
        assert all(torch.equal(found.values[key], values) for key, values in scores[0].values.items())
        assert found.details == scores[0].details


@cases("speedup", "builtin")
def test_each_process_passes_its_share_of_the_windows(folders, alone, name):
    """Beside a few that all pass: the probes of the checks before and after surgery, what a search settles on."""
    _, expected = alone(name)
    passed = [json.loads((folder / "passed.json").read_text())[name] for folder in folders]
    # Removals are measured beside the model without those before, which every process runs: 16 windows, four times.
    common = 10 + (expected / 2 if name == "search" else 64 if name == "removal_loss" else 0)

    assert sum(passed) >= expected
    assert max(passed) <= common + 1.3 * (expected - common) / len(folders), (passed, expected)


@pytest.mark.parametrize(
    ("folders", "name"),
    [(processes, name) for processes in (2, 3) for name in prune_in_ranks.resumed_in(processes)],
    indirect=["folders"],
)
def test_a_run_of_several_processes_goes_on(folders, name):
    for folder in folders:
        plan = json.loads((folder / f"{name}.json").read_text())
        for time in ("first", "again"):
            assert json.loads((folder / f"{name} {time}.json").read_text()) == plan
        passed = json.loads((folder / "passed.json").read_text())
        assert passed[f"{name} again"] < 0.7 * passed[f"{name} first"]
    written = {path.name for path in (folder.parent / "state" / name).iterdir()}
    if name == "offloaded":
        # Statistics are shared, since a layer's are complete when it is left; hidden states are of each process.
        hidden = [path.name for path in (folder.parent / "state" / name / f"{OF_LAYERS}-hidden-states").iterdir()]
        assert sorted(hidden) == [f"{rank}-of-{len(folders)}" for rank in range(len(folders))]
        return
    own = {each for each in written if each.startswith(("statistics", "calibration"))}

    # The sums of each are its own.
    assert len(own) % len(folders) == 0 and own
    assert all(f"-of-{len(folders)}.safetensors" in each for each in own)
    assert not any("-of-" in each for each in written - own)


def test_processes_that_were_killed_apart_go_on_from_the_layer_that_all_have_left(tmp_path, monkeypatch):
    """One has written that it is in front of layer 5 and the other has not: both still have what layer 4 reads."""

    class KilledError(Exception):
        pass

    def shelf_of(rank):
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        return Shelf(tmp_path)

    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "gathered", lambda value: value[None])
    for rank in range(2):
        shelf = shelf_of(rank)
        shelf["4.0.0"] = torch.full([2], float(rank))
        shelf.settle(4)
    shelf = shelf_of(0)
    shelf["5.0.0"] = shelf.pop("4.0.0") + 10

    def kill(_value):
        raise KilledError

    monkeypatch.setattr(ranks, "gathered", kill)
    with pytest.raises(KilledError):
        shelf.settle(5)
    # Of two processes that start at the same time each knows what the other has.
    monkeypatch.setattr(ranks, "gathered", lambda _value: torch.tensor([5, 4]))
    shelves = [shelf_of(rank) for rank in range(2)]

    assert [shelf.settled for shelf in shelves] == [4, 4]
    assert [float(shelf["4.0.0"][0]) for shelf in shelves] == [0.0, 1.0]


@pytest.mark.parametrize("options", [{}, {"device_map": None}, {"device_map": "auto"}, {"low_memory": True}])
def test_each_process_loads_its_model_on_its_own_accelerator(options, tmp_path, monkeypatch):
    tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
    monkeypatch.setenv("WORLD_SIZE", "2")
    state = SimpleNamespace(num_processes=2, process_index=1, device=torch.device("cuda", 1))
    monkeypatch.setattr(ranks, "_state", lambda: state)
    loaded = {}

    def load(model_id, auto_class, **kwargs):
        loaded.update(kwargs)
        return tiny.make_model("llama_gqa_biases")

    monkeypatch.setattr(opening, "load_for_task", load)
    FwdPruner.from_pretrained(tmp_path / "dense", offload_folder=tmp_path / "offload", **options)

    if options.get("device_map") is None and not options.get("low_memory"):
        assert loaded["device_map"] == {"": torch.device("cuda", 1)}
    else:
        assert loaded["device_map"] not in (None, {"": torch.device("cuda", 1)})
    assert loaded["offload_folder"] == tmp_path / "offload" / "1-of-2"


def test_a_single_process_and_processes_without_accelerators_stay_on_the_cpu(monkeypatch):
    state = SimpleNamespace(num_processes=2, process_index=1, device=torch.device("cpu"))
    monkeypatch.setattr(ranks, "_state", lambda: state)
    for world_size in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        assert placed({"dtype": "auto"}) == {"dtype": "auto"}


@pytest.mark.parametrize(
    ("device", "own", "words"),
    [
        ("cpu", "cuda:0", "although this machine has an accelerator (cuda). Load it with device_map='cuda'"),
        ("cuda:0", "cuda:1", "computes on cuda:0, although its own accelerator is cuda:1"),
        ("cuda:1", "cuda:1", None),
        ("cuda", "cuda:1", None),
    ],
)
def test_a_model_beside_an_idle_accelerator_is_warned_of(device, own, words, monkeypatch):
    state = SimpleNamespace(num_processes=2, process_index=1, device=torch.device(own))
    monkeypatch.setattr(ranks, "_state", lambda: state)
    monkeypatch.setattr(placement, "input_device", lambda model: torch.device(device))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    said = []
    monkeypatch.setattr(placement.logger, "warning", lambda text, *values: said.append(text % values))
    placement.warn_of_placement(tiny.make_model("llama_gqa_biases"))

    assert [words in text for text in said] == ([True] if words else [])


def test_one_process_writes_and_all_learn_of_its_failure(folders):
    words = [json.loads((folder / "refusal.json").read_text()) for folder in folders]
    saved = folders[0].parent / "saved"

    assert words[0].startswith("FileExistsError:") and "is not empty" in words[0]
    assert all(each.startswith("RuntimeError: The main process failed: FileExistsError") for each in words[1:])
    assert sorted(path.name for path in saved.parent.iterdir()) == [*map(str, range(len(folders))), "saved", "state"]


def test_the_command_writes_and_speaks_once(tmp_path):
    tiny.make_model("llama_gqa_biases").save_pretrained(tmp_path / "dense")
    tiny.make_tokenizer().save_pretrained(tmp_path / "dense")
    command = ["-m", "optimum.commands.optimum_cli", "fwdprune", "prune", "-m", tmp_path / "dense", tmp_path / "out"]
    done = launch(2, *command, "--calibration", "builtin", "--n_samples", 4, "--seq_len", 16)

    assert done.stdout.count("Saved to ") == 1
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]
