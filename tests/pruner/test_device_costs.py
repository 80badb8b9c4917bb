"""What runs on an accelerator cost in memory there, and how often the host waits for it."""

import pytest
import tiny
import torch
from second_device import FIRST, request_of

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.cutting import in_memory
from optimum_fwdprune.data.calibration import Calibration
from optimum_fwdprune.forward import divergence
from optimum_fwdprune.forward.divergence import Divergence
from optimum_fwdprune.loading.subject import Subject
from optimum_fwdprune.reconstruction import gauss_newton
from optimum_fwdprune.reconstruction.streams import Stream
from optimum_fwdprune.runs.shelves import Shelf


def prune(name, tokens, place=FIRST, channels=64, **fields):
    """Prune a tiny model by a named request, and return it."""
    model = tiny.make_model("llama_gqa_biases", intermediate_size=channels).to(place)
    return FwdPruner(model).prune(request_of(name, **fields), tokens)


@pytest.mark.parametrize("name", ["sequential", "independent", "refit sources", "flap global"])
def test_refitted_parameters_wait_in_the_memory_of_the_host(name, device, tokens, monkeypatch):
    waiting = []
    surgery = in_memory.prune_model

    def cut(subject, plan, projections, inplace):
        for projection in projections.values():
            waiting.extend([projection.weight, projection.bias, *projection.sources.values()])
        return surgery(subject, plan, projections, inplace)

    monkeypatch.setattr(in_memory, "prune_model", cut)
    prune(name, tokens)

    assert waiting
    assert {str(tensor.device) for tensor in waiting if tensor is not None} == {"cpu"}


@pytest.mark.parametrize("name", ["sequential", "independent", "refit MLP sources", "search"])
def test_hidden_states_wait_in_the_memory_of_the_host(name, device, tokens, monkeypatch):
    waiting = []
    settle, measure, linearize = Shelf.settle, Divergence._measure, Stream.linearize

    def settled(shelf, layer):
        settle(shelf, layer)
        waiting.extend(shelf._tensors.values())

    def measured(divergence, *args, **kwargs):
        result = measure(divergence, *args, **kwargs)
        waiting.extend([*divergence._embedded, *divergence._targets])
        waiting.extend(hidden for of_batch in divergence._settled for hidden in of_batch)
        return result

    def linearized(stream, *args):
        result = linearize(stream, *args)
        waiting.extend([result.inputs, result.slopes, result.residual])
        return result

    monkeypatch.setattr(Shelf, "settle", settled)
    monkeypatch.setattr(Divergence, "_measure", measured)
    monkeypatch.setattr(Stream, "linearize", linearized)
    # Independent least squares of a model in memory gathers all matrices in one pass, where they are small.
    monkeypatch.setattr("optimum_fwdprune.scoring.score_units.grams_fit", lambda _sites: False)
    prune(name, tokens)

    assert waiting and {tensor.device.type for tensor in waiting} == {"cpu"}


def test_linearized_sites_are_solved_a_part_of_their_tokens_at_a_time(tokens, monkeypatch):
    expected = prune("refit MLP sources", tokens, "cpu")
    largest = []
    part = gauss_newton.Linearized.part

    def recorded(linearized, tokens, device):
        result = part(linearized, tokens, device)
        largest.append(len(result.inputs))
        return result

    monkeypatch.setattr(gauss_newton, "TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(gauss_newton.Linearized, "part", recorded)
    pruned = prune("refit MLP sources", tokens, "cpu")

    assert max(largest) == 7
    for (name, value), found in zip(expected.named_parameters(), pruned.parameters()):
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4, msg=name)


# What runs often, in requests that make as many passes for any number of units, and for any windows of a batch.
NONE = {"reconstruction": "none", "reconstruction_order": "independent"}
OFTEN = {
    "statistics": lambda windows: ("none", {}),
    "sequential least squares": lambda windows: ("sequential", {"ridge": 0.1}),
    "independent least squares": lambda windows: ("independent", {"ridge": 0.1}),
    "draws of weights": lambda windows: ("mini_llm weights", {"windows_per_draw": windows}),
    "draws of units": lambda windows: ("mini_llm units", {**NONE, "draws": 4, "windows_per_draw": windows}),
    "policy-gradient steps": lambda windows: ("policy_gradient unit", {"windows_per_step": windows}),
}


@pytest.mark.parametrize("case", OFTEN)
def test_the_host_waits_no_oftener_for_more_units_or_windows(case, device, tokens):
    def waits(windows, channels):
        name, fields = OFTEN[case](windows)
        device.waits.clear()
        prune(name, tokens[:windows], channels=channels, batch_size=128, **fields)
        return len(device.waits)

    few = waits(8, 64)
    # Whether a refit helps may take a wait or less at each of the six sites; 64 units more, or 8 windows, none.
    assert waits(8, 128) <= few + 6
    assert waits(16, 64) <= few + 6


def test_the_host_reads_one_number_of_a_comparison_of_whole_models(device, tokens, monkeypatch):
    model = tiny.make_model("llama_gqa_biases").to(FIRST)
    monkeypatch.setattr(divergence, "LOGITS_AT_ONCE", 10 * tiny.VOCAB)
    waits = []
    for windows in (4, 16):
        compared = Divergence(Subject.of(model), Calibration(tokens[:windows]), batch_size=windows)
        device.waits.clear()
        compared.of({})
        waits.append(len(device.waits))

    # transformers reads a number of every batch, too.
    assert waits == [2, 2]


def test_the_time_of_a_stage_includes_what_the_accelerator_still_does(device, tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases").to(FIRST))
    pruner.prune(request_of("none"), tokens)

    # Each of three layers is settled, put down and passed by the probe. Settling ends once, surgery opens and
    # finishes, and verification starts its probe, ends it, and compares.
    before_the_loop, in_the_loop, around_it = 3, 3 * 3, 1 + 2 + 3
    assert len(pruner.report.seconds) == 6
    assert device.waits.count("synchronize") == before_the_loop + in_the_loop + around_it
