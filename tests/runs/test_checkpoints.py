"""Runs that are killed go on to the same result, bit for bit; states of other runs, and damaged ones, are refused."""

import os
import random
import select
import signal
import time

import pytest
import safetensors.torch
import tiny
import torch

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.files import load_tensors
from optimum_fwdprune.request import files
from optimum_fwdprune.runs.resume import Resume, digest_of
from optimum_fwdprune.scoring.gradients import perturbation


# Name -> fields of a request; each keeps at least one long stage busy.
CASES = {
    "statistics and sequential least squares": {"batch_size": 2},
    "sources": {"sparsity": 0.3, "kinds": ["mlp"], "refit_sources": True},
    "independent least squares": {"batch_size": 2, "reconstruction_order": "independent"},
    "text from the model": {"calibration": "self", "n_samples": 40, "seq_len": 8, "batch_size": 1},
    "draws": {"method": "mini_llm", "draws": 24, "batch_size": 2, "windows_per_draw": 2, "reconstruction": "none"},
    "draws that settle": {"method": "mini_llm", "perturb": "units", "draws": 40, "stop_after": 4, "batch_size": 2},
    "policy gradient": {"method": "policy_gradient", "steps": 20, "antithetic": True},
    "search": {"scope": "search", "search_windows": 100, "budget": "joint"},
    "rounds": {"rounds": 2, "batch_size": 2, "reconstruction": "none"},
}
KILLS = 3


def run(fields, tokens, folder=None):
    """Prune a tiny model, its states in `folder`, written after every step."""
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    state = {} if folder is None else {"resume": str(folder), "resume_seconds": 0.0}
    request = tiny.request(**{"sparsity": 0.4, "seed": 3, **fields, **state})
    if request.refit_sources:
        # Enough for what is fitted to hold on windows that were kept out.
        tokens = torch.randint(0, tiny.VOCAB, (96, 24), generator=torch.Generator().manual_seed(1))
    pruner.prune(request, None if "calibration" in fields else tokens)
    return pruner


def in_child(work):
    """Start `work` in a forked process, which has everything imported, and return its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def was_killed(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def assert_same(found, expected):
    assert found.plan.kept == expected.plan.kept
    assert found.plan.metadata == expected.plan.metadata
    for key, values in expected.scores.values.items():
        assert torch.equal(found.scores.values[key], values)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name


def test_refitted_sources_are_taken_up_again(tokens, tmp_path):
    expected = run(CASES["sources"], tokens, tmp_path)
    # Those of the first MLP by Gauss-Newton steps, since it reads what it read.
    assert expected.plan.metadata["reconstructed"]["0.mlp"]["sources_refitted"]
    assert expected.plan.metadata["reconstructed"]["1.attention"]["sources_refitted"]
    assert_same(run(CASES["sources"], tokens, tmp_path), expected)


@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_at_any_moment_ends_where_it_would_have(name, tokens, tmp_path):
    """27 kills over all cases; each run is killed until it was often enough, and then left to finish."""
    start = time.monotonic()
    expected = run(CASES[name], tokens)
    seconds = time.monotonic() - start
    moments = random.Random(name)
    killed, attempts = 0, 0
    while killed < KILLS:
        folder = tmp_path / str(attempts - killed)
        pid = in_child(lambda folder=folder: run(CASES[name], tokens, folder))
        child = os.pidfd_open(pid)
        # Until it ends, or its hour has come.
        select.select([child], [], [], moments.uniform(0.1, 1.0) * seconds)
        os.close(child)
        os.kill(pid, signal.SIGKILL)
        killed += was_killed(pid)
        attempts += 1
        for file in folder.rglob("[!.]*.safetensors"):
            # Whole, whatever happened.
            load_tensors(file)

    assert_same(run(CASES[name], tokens, folder), expected)


@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_while_it_writes_ends_where_it_would_have(name, tokens, tmp_path):
    """In the middle of its second state: half a file is there, and the first state still is."""
    written = []

    def dies_half_way(tensors, file, metadata=None):
        content = safetensors.torch.save(tensors, metadata)
        written.append(1)
        if len(written) < 2:
            file.write_bytes(content)
        else:
            file.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        safetensors.torch.save_file = dies_half_way
        run(CASES[name], tokens, tmp_path)

    assert was_killed(in_child(work))
    assert len(list(tmp_path.rglob(".*.partial"))) == 1 and list(tmp_path.rglob("[!.]*.safetensors"))
    assert_same(run(CASES[name], tokens, tmp_path), run(CASES[name], tokens))


@pytest.mark.parametrize("name", CASES)
def test_a_finished_run_measures_nothing_again(name, tokens, tmp_path, monkeypatch):
    run(CASES[name], tokens, tmp_path)
    states = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    passed = []
    make = tiny.make_model

    def counted(*args):
        model = make(*args)
        model.model.layers[0].register_forward_hook(lambda _module, _args, output: passed.append(len(output)))
        return model

    monkeypatch.setattr(tiny, "make_model", counted)
    run(CASES[name], tokens)
    alone = sum(passed)
    passed.clear()
    run(CASES[name], tokens, tmp_path)

    assert sum(passed) < 0.6 * alone
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")} == states


def test_states_of_another_model_request_text_or_version_are_refused(tokens, tmp_path, monkeypatch):
    fields = CASES["draws"]
    run(fields, tokens, tmp_path)
    model = tiny.make_model("llama_gqa_biases")
    request = tiny.request(**{"sparsity": 0.4, "seed": 3, **fields, "resume": str(tmp_path)})

    with pytest.raises(ValueError, match=r"belongs to another run: its sparsity is 0\.4, this one's is 0\.3"):
        run({**fields, "sparsity": 0.3}, tokens, tmp_path)
    # What no sum of the weights tells apart.
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] *= -1
    with pytest.raises(ValueError, match="belongs to another run: its weights is"):
        FwdPruner(model).prune(request, tokens)
    with pytest.raises(ValueError, match="belongs to another run: its model is 'LlamaForCausalLM', this one's is 'Mi"):
        FwdPruner(tiny.make_model("mistral_sliding_window")).prune(request, tokens)
    # As a run that was killed before it knew all scores.
    (tmp_path / "scores.safetensors").unlink()
    file = tmp_path / "draws.safetensors"
    with pytest.raises(ValueError, match=f"{file} belongs to another run: its tokens is"):
        run(fields, tokens.flip(0), tmp_path)
    monkeypatch.setattr(files, "__version__", "9.9")
    with pytest.raises(ValueError, match=r"its fwdprune_version is '.*', this one's is '9\.9'"):
        run(fields, tokens, tmp_path)


def test_another_batch_size_goes_on(tokens, tmp_path):
    """It is what one changes after an interrupt for want of memory."""
    run(CASES["draws"], tokens, tmp_path)
    run({**CASES["draws"], "batch_size": 1}, tokens, tmp_path)


def test_noise_of_another_device_is_not_mixed_in(tokens, tmp_path, monkeypatch):
    """The same seeds give other numbers there, and the slopes that were measured belong to the old ones."""
    run(CASES["draws"], tokens, tmp_path)
    (tmp_path / "scores.safetensors").unlink()
    monkeypatch.setattr(perturbation, "generator_of", lambda device: "Another GPU")
    with pytest.raises(ValueError, match=r"its noise is \['cpu'\], this one's is \['Another GPU'\]"):
        run(CASES["draws"], tokens, tmp_path)


@pytest.mark.parametrize("name", ["draws", "search", "statistics and sequential least squares", "rounds"])
def test_a_run_goes_on_where_rounding_differs(name, tokens, tmp_path, monkeypatch):
    """As with another number of threads, on another device, or under another torch: sums differ in their last bits."""
    fields = {**CASES[name], "reconstruction": "bias"} if name == "rounds" else CASES[name]
    expected = run(fields, tokens, tmp_path)
    plain_sum, plain_mul = torch.Tensor.sum, torch.Tensor.__mul__
    monkeypatch.setattr(torch.Tensor, "sum", lambda self, *args, **kwargs: off(plain_sum(self, *args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "__mul__", lambda self, other: off(plain_mul(self, other)))

    assert_same(run(fields, tokens, tmp_path), expected)


def off(values):
    """Off by a rounding error, in an in-place operation that is not stood in for."""
    if values.is_floating_point():
        values = values.detach().clone()
        values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).bitwise_xor_(1)
    return values


def test_the_fingerprint_of_weights_is_of_their_bytes():
    weight = torch.randn(300, 200)
    fingerprint = digest_of([("weight", weight)])
    changed = weight.clone()
    changed.view(torch.int32)[7, 7] ^= 1

    assert digest_of([("weight", weight.T.contiguous().T)]) == fingerprint
    assert digest_of([("weight", weight.requires_grad_())]) == fingerprint
    others = [("weight", changed), ("weight", weight.flip(0)), ("weight", weight.view(200, 300)), ("other", weight)]
    others.append(("weight", weight.detach().view(torch.int32)))
    assert len({fingerprint, *(digest_of([other]) for other in others)}) == 1 + len(others)
    assert digest_of([("scale", torch.tensor(2.0, dtype=torch.bfloat16))]) != digest_of([])


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"half"])
def test_damaged_states_are_named(tokens, tmp_path, content):
    run(CASES["draws"], tokens, tmp_path)
    # What comes later first: scores that are known need no draws.
    for file in sorted(tmp_path.iterdir(), reverse=True):
        whole = file.read_bytes()
        file.write_bytes(content or whole[:-1])
        with pytest.raises(ValueError, match=f"{file} is not the state of a run"):
            run(CASES["draws"], tokens, tmp_path)
        file.unlink()


def test_states_are_written_now_and_then_and_take_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stage = Resume(tmp_path, {}, 60.0).stage("stage")
    saved = []

    def state():
        saved.append(clock[0])
        clock[0] += 20.0
        return {}, {}

    while clock[0] < 600.0:
        stage.save_now_and_then(state)
        clock[0] += 1.0

    # A minute after the start; then ten times what writing took.
    assert saved == [60.0, 280.0, 500.0]


def test_where_the_state_is_stays_on_this_machine(tokens, tmp_path):
    pruner = run({"reconstruction": "none"}, tokens, tmp_path / "state")
    pruner.save_pretrained(tmp_path / "out")

    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or str(tmp_path / "state").encode() not in file.read_bytes(), file
