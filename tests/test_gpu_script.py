"""`benchmarks/gpu.py`, on the CPU and with tiny shapes: one run tells what fails, whatever fails in it."""

import json
import logging
import sys
from pathlib import Path

import pytest
import second_device
import torch

from optimum_fwdprune.cutting import cut as cutting


@pytest.fixture(scope="module")
def gpu():
    """The script as a module."""
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import gpu
    finally:
        sys.path.remove(folder)
    return gpu


@pytest.fixture
def gpu_run(gpu):
    """What runs its parts."""
    return sys.modules[gpu.run_parts.__module__]


@pytest.fixture
def run(gpu, tmp_path):
    """Runs the script on some parts; returns its exit status, its JSON and its table."""

    def run(*options):
        output = tmp_path / "results" / "gpu"
        status = gpu.main(["--device", "cpu", "--tiny", "--output", str(output), *options])
        return status, json.loads(output.with_suffix(".json").read_text()), output.with_suffix(".md").read_text()

    return run


@pytest.mark.parametrize("only", ["requests: llama, float32, sequential", "padded", "random state", "saved and"])
def test_a_request_on_the_device_is_compared_with_the_cpu(run, only):
    status, document, _ = run("--only", only)
    (record,) = document["parts"]
    assert status == 0
    assert record["status"] == "ok"
    if "float32" in only or only == "padded":
        assert record["overlap"] == 1
        assert record["logits_difference"] == 0


@pytest.mark.parametrize("placement", ["layers on cpu", "layers on disk", "cpu_offload", "disk_offload", "low_memory"])
def test_offloaded_models_are_tried(run, placement):
    status, document, _ = run("--only", f"{placement}, none")
    assert status == 0
    assert [record["part"] for record in document["parts"]] == [f"{placement}, none"]


def test_pruning_a_large_shape_gives_seconds_of_every_stage(run):
    status, document, page = run("--only", "LLaMA-2-7B, balanced, 23 GiB")
    (record,) = document["parts"]
    assert status == 0
    assert {"score", "allocate", "reconstruct", "surgery", "verify"} <= record["seconds_by_stage"].keys()
    assert record["peaks"].keys() == record["seconds_by_stage"].keys()
    # A CPU's memory cannot be limited.
    assert record["limit_gib"] is None
    assert "reconstruct" in page


def test_a_stage_that_runs_out_of_memory_is_named_with_what_those_before_took(run, monkeypatch):
    def fail(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(cutting, "reconstruct_by_layer", fail)
    status, document, page = run("--only", "LLaMA-2-7B, best, 23 GiB")
    (record,) = document["parts"]
    assert status == 1
    assert record["error"] == "OutOfMemoryError: CUDA out of memory"
    assert list(record["peaks"])[-1] == "reconstruct"
    assert "score" in record["peaks"]
    assert "in fail" in page


def test_what_the_package_says_of_a_part_is_kept(run, gpu, monkeypatch):
    def say(*_):
        logging.getLogger("optimum_fwdprune.pruner").warning("Mind %s.", "this")
        return {}

    monkeypatch.setattr(gpu.gpu_requests, "request", say)
    _, document, _ = run("--only", "requests: llama, float32, none")
    assert document["parts"][0]["messages"] == ["Mind this."]


def test_speed_is_measured_at_several_sparsities(run):
    _, document, page = run("--only", "speed: sparsity")
    sizes = [record["parameters"] for record in document["parts"]]
    assert sizes == sorted(sizes, reverse=True)
    assert len({*sizes}) == 4
    assert "prefill" in page


def test_the_document_says_what_it_was_measured_on_and_goes_on_from_itself(run):
    _, first, page = run("--only", "llama, float32, none")
    assert first["environment"]["torch"] == torch.__version__
    assert first["environment"]["optimum-fwdprune"]
    assert "1 ok, 0 failed, 0 not run" in page
    _, second, _ = run("--only", "llama, float32, bias", "--continue")
    assert [record["part"] for record in second["parts"]] == ["llama, float32, none", "llama, float32, bias"]
    assert second["parts"][0] == first["parts"][0]


def test_every_method_and_reconstruction_is_in_the_table(gpu):
    from optimum_fwdprune import PruningConfig

    requests = [PruningConfig(**fields) for fields in gpu.REQUESTS.values()]
    # Other tests register methods in this process.
    methods = {"wanda_sp", "flap", "magnitude", "random", "taylor", "mini_llm", "policy_gradient"}
    assert {request.method for request in requests} == methods
    assert {request.reconstruction for request in requests} == {"none", "bias", "least_squares"}
    assert all("kinds" in fields and "reconstruction" in fields for fields in gpu.REQUESTS.values())


def test_a_part_that_fails_is_recorded_and_the_others_still_run(run, gpu, monkeypatch):
    compared = gpu.gpu_requests.compared

    def damaged(pruner, result, layout, name, dtype):
        if name == "bias":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if name == "magnitude":
            result["logits"] = result["logits"] * 2
        return compared(pruner, result, layout, name, dtype)

    monkeypatch.setattr(gpu.gpu_requests, "compared", damaged)
    monkeypatch.setattr(gpu, "REQUESTS", {name: {} for name in ("none", "bias", "magnitude", "random")})
    status, document, page = run("--only", "requests: llama, float32")
    by_name = {record["part"].rpartition(", ")[2]: record for record in document["parts"]}
    assert status == 1
    assert {name: record["status"] for name, record in by_name.items()} == {
        "none": "ok",
        "bias": "failed",
        "magnitude": "failed",
        "random": "ok",
    }
    assert by_name["bias"]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert "in damaged" in by_name["bias"]["traceback"]
    assert "the logits differ" in by_name["magnitude"]["error"]
    assert document["summary"] == "2 ok, 2 failed, 0 not run"
    assert "in damaged" in page


class Waits:
    """Something to run that takes as long as it says by the script's clock."""

    def __init__(self, gpu_run, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(gpu_run.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(gpu_run.Device, "free", lambda _device: None)
        self._gpu_run = gpu_run

    def part(self, group, name, seconds):
        def run():
            self.now += seconds
            return {}

        return self._gpu_run.Part(group, name, seconds, run)


def test_parts_that_do_not_fit_into_the_time_are_recorded_as_not_run(gpu_run, monkeypatch):
    clock = Waits(gpu_run, monkeypatch)
    parts = [clock.part("pruning", "long", 60), clock.part("requests", "short", 5), clock.part("speed", "longer", 90)]
    records, written = [], []
    gpu_run.run_parts(parts, gpu_run.Device("cpu"), 100, records, lambda: written.append(len(records)))
    assert {record["part"]: record["status"] for record in records} == {
        "long": "ok",
        "short": "ok",
        "longer": "not run",
    }
    assert records[-1]["reason"] == "no time left: 35 s, and it may take 90"
    # A run that is killed has lost nothing.
    assert written == [1, 2, 3]


def test_a_group_that_used_up_its_share_waits_for_the_others(gpu_run, monkeypatch):
    clock = Waits(gpu_run, monkeypatch)
    parts = [clock.part("requests", f"request {number}", 20) for number in range(3)]
    parts += [clock.part("pruning", "7B", 30)]
    records = []
    gpu_run.run_parts(parts, gpu_run.Device("cpu"), 100, records, lambda: None)
    assert [record["part"] for record in records] == ["request 0", "7B", "request 1", "request 2"]
    assert [record["status"] for record in records] == ["ok", "ok", "ok", "ok"]


def test_a_part_that_hangs_is_ended(gpu_run):
    def hang():
        while True:
            pass

    record = gpu_run.run_part(gpu_run.Part("speed", "hangs", 1, hang), gpu_run.Device("cpu"), 0.05)
    assert record["status"] == "failed"
    assert record["error"] == "OutOfTime: not done after 0 s"


def test_a_lost_device_ends_the_process_that_lost_it(gpu_run, monkeypatch):
    device = gpu_run.Device("cpu")
    monkeypatch.setattr(device, "answers", lambda: False)

    def fail():
        raise RuntimeError("CUDA error: device-side assert triggered")

    records = []
    parts = [gpu_run.Part("speed", "first", 1, fail), gpu_run.Part("speed", "second", 1, dict)]
    assert not gpu_run.run_parts(parts, device, 100, records, lambda: None)
    assert [record["status"] for record in records] == ["failed"]


PARTS = ["requests: llama, bfloat16, refit sources", "low_memory, sequential", "two devices, none"]


@pytest.mark.parametrize("only", PARTS)
def test_the_script_runs_on_an_accelerator(only, run, monkeypatch):
    with second_device.second_device(monkeypatch):
        status, document, page = run("--device", second_device.FIRST, "--only", only)
    assert status == 0, page
    (record,) = document["parts"]
    assert second_device.FIRST in record["places"]
