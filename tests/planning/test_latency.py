"""Latency as a budget: tables that are measured and kept, and plans that save what was asked for."""

import dataclasses
import itertools
import json
import logging
import math

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optimum_fwdprune import FwdPruner, PruningConfig, PruningPlan, find_sites
from optimum_fwdprune.allocation.allocate import allocate
from optimum_fwdprune.allocation.budgets import Budget
from optimum_fwdprune.architectures import get_architecture
from optimum_fwdprune.loading.subject import Subject
from optimum_fwdprune.planning import timing
from optimum_fwdprune.planning.latency import (
    SMALLEST_REST,
    Latencies,
    LatencyCost,
    LatencyTable,
    shape_of,
    speed_budget,
)
from optimum_fwdprune.planning.timed_layers import Calls, LayerCopies, timed_runs
from optimum_fwdprune.planning.timing import load_or_measure


PROMPT = 16


def request_of(**fields):
    return tiny.request(**{"target_speedup": 1.2, "latency_tokens": PROMPT, **fields})


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(timing, "median_seconds", tiny.counted_seconds)


@pytest.fixture(scope="module")
def llama_sites():
    return find_sites(tiny.make_model("llama_mha_tied"))


def made_up(curves, model_seconds=1.0, layer_seconds=0.0):
    """Latencies by the curve of every shape, which begins without the sublayer."""
    return Latencies(
        PROMPT, model_seconds, layer_seconds, {shape: [(0, 0.0), *curve] for shape, curve in curves.items()}
    )


def made_up_latencies(sites):
    """Every attention unit takes 1 % of the model's time, the first half of an MLP 1 %, the other half nothing."""
    seconds = {}
    for site in sites:
        if site.kind == "attention":
            curve = [(units, units / 100) for units in range(site.num_groups, site.num_units + 1, site.num_groups)]
        else:
            curve = [(1, 0.0), (site.num_units // 2, 0.01), (site.num_units, 0.01)]
        seconds[shape_of(site)] = curve
    return made_up(seconds)


def test_layers_of_every_width_are_timed(dense, monkeypatch):
    """Each run is a forward pass of a layer that holds what the plan of that width leaves, at finite numbers."""
    sites = find_sites(dense)
    before = {name: parameter.clone() for name, parameter in dense.named_parameters()}
    sizes = []

    def seconds(runs, repeats, device):
        outputs = [run() for run in runs]
        assert all((o[0] if isinstance(o, tuple) else o).isfinite().all() for o in outputs[:-1])
        sizes.append([1e-3 * (1 + place) for place in range(len(runs))])
        return sizes[-1]

    monkeypatch.setattr(timing, "median_seconds", seconds)
    table = load_or_measure(Subject(dense, sites), request_of())
    (latencies,) = table.phases.values()
    assert set(latencies.site_seconds) == {shape_of(site) for site in sites}
    for site in sites:
        removed, *widths = [units for units, _ in latencies.site_seconds[shape_of(site)]]
        assert widths == sorted(set(widths)) and widths[-1] == site.num_units
        # MLPs in sixteenths, attention in all that its groups allow.
        step = site.num_units // 16 if site.kind == "mlp" else site.num_groups
        assert removed == 0 and widths == list(range(step, site.num_units + 1, step))
    assert all(torch.equal(parameter, before[name]) for name, parameter in dense.named_parameters())


@pytest.mark.parametrize(("tokens", "layers"), [(8, [0]), (9, [0, 2])])
def test_attention_with_a_window_is_timed_apart_where_more_tokens_are_cached(tokens, layers, clock, monkeypatch):
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    model = tiny.make_model("gemma3_text", layer_types=types, sliding_window=8)
    timed = []

    def runs_of(subject, site, kept, calls):
        runs = timed_runs(subject, site, kept, calls)
        lengths = {cache.keys.shape[-2] for (layer, *_), cache in calls._stored.items() if layer == site.layer}
        timed.append((site.kind, site.layer, lengths))
        return runs

    monkeypatch.setattr(timing, "timed_runs", runs_of)
    table = load_or_measure(Subject.of(model), request_of(speed_of="decode", latency_context=tokens))
    shapes = [shape_of(site) for site in find_sites(model) if site.kind == "attention"]

    assert [layer for kind, layer, _ in timed if kind == "attention"] == layers
    # A cache with a window holds one token less than it.
    assert [cached for kind, _, cached in timed if kind == "attention"] == [{7}, {tokens}][: len(layers)]
    assert shapes[0] == shapes[1] != shapes[2]
    assert table.phases["decode"].site_seconds.keys() >= set(shapes)


def test_a_timed_layer_is_as_large_as_the_pruned_one(dense, clock):
    """The clock counts parameters, so the predicted speed-up is that of parameters: exactly."""
    pruner = FwdPruner(dense)
    sites = find_sites(dense)
    layers = sum(site.num_parameters for site in sites)
    request = request_of(method="magnitude", reconstruction="none")
    pruner.prune(request, inplace=False)
    model_parameters = sum(parameter.numel() for parameter in dense.parameters())
    removed = pruner.report.removed_parameters
    speedup = pruner.report.speedup
    assert speedup.requested == 1.2 and removed < layers
    # A picosecond per unit of rounding.
    expected = model_parameters / (model_parameters - removed)
    assert speedup.predicted == pytest.approx(expected, rel=1e-4)
    assert speedup.measured == pytest.approx(expected, rel=1e-6)
    assert speedup.predicted >= 1.2


def test_time_is_spent_and_not_parameters():
    """Half of an MLP costs no time, so heads go, although channels score less per parameter."""
    model = tiny.make_model("llama_mha_tied")
    sites = find_sites(model)
    latencies = made_up_latencies(sites)
    scores = {site.key: torch.full((site.num_units,), 100.0 if site.kind == "attention" else 2.0) for site in sites}
    request = tiny.request(scope="global", budget="joint")
    kept = allocate(sites, scores, request, speed_budget(latencies, 1 / (1 - 0.06)))
    assert sum(len(kept[(layer, "attention")]) for layer in range(3)) == 18 - 6
    assert all(len(kept[(layer, "mlp")]) == 64 for layer in range(3))
    by_parameters = allocate(sites, scores, request, Budget(6 * sites[0].unit_parameters))
    assert all(len(by_parameters[(layer, "attention")]) == 6 for layer in range(3))
    cost = LatencyCost(latencies)
    saved = sum(cost.total(s) - int(cost.of(s, torch.tensor([len(kept[s.key])]))) for s in sites)
    assert saved >= 0.06e12 * (1 - 1e-6)
    assert cost.speedup(saved) >= 1 / (1 - 0.06) * (1 - 1e-6)


@settings(max_examples=200, deadline=None)
@example(seed=19, scope="layer", additive=False, share=0.09375)
@given(st.integers(0, 999), st.sampled_from(["layer", "global"]), st.booleans(), st.floats(0.05, 0.95))
def test_a_plan_is_no_faster_than_asked_for(llama_sites, seed, scope, additive, share):
    """However uneven the table: one width less cut from one site, and the target would be missed."""
    generator = torch.Generator().manual_seed(seed)
    times = torch.rand(16, generator=generator).tolist()
    widths = range(4, 65, 4)
    mlps = [site for site in llama_sites if site.kind == "mlp"]
    cost = LatencyCost(made_up({shape_of(mlps[0]): list(zip(widths, times))}))
    scores = {site.key: torch.rand(site.num_units, generator=generator) for site in llama_sites}
    request = tiny.request(scope=scope, kinds=["mlp"], multiple_of=4, skip_layers=[], min_units_per_site=4)
    saving = [cost.of(site, torch.tensor([site.num_units])) - cost.of(site, torch.tensor(widths)) for site in mlps]
    amount = int(share * sum(int(each[0]) for each in saving))
    kept = allocate(mlps, scores, request, Budget(amount, at_least=True, cost=cost), additive)

    places = [len(kept[site.key]) // 4 - 1 for site in mlps]
    surplus = sum(int(each[place]) for each, place in zip(saving, places)) - amount
    given_back = [int(each[place] - each[place + 1]) for each, place in zip(saving, places) if place < 15]
    # Layers' shares are whole nanoseconds, rounded up.
    assert 0 <= surplus < (min(given_back) if scope == "global" else max(given_back) + len(mlps))


def test_layers_make_up_for_what_others_round_up():
    """Three layers that can save 10 ms or nothing save 20 ms of the 15 asked for, and all alike 30."""
    sites = find_sites(tiny.make_model("llama_mha_tied"))
    mlps = [site for site in sites if site.kind == "mlp"]
    cost = LatencyCost(made_up({shape_of(mlps[0]): [(32, 0.0), (64, 0.01)]}))
    scores = {site.key: torch.rand(site.num_units) for site in sites}
    budget = Budget(int(0.015 * 1e12), at_least=True, cost=cost)
    for layout, widths in (("any", [32, 64, 32]), ("stock", [32, 32, 32])):
        request = tiny.request(kinds=["mlp"], multiple_of=32, skip_layers=[], layout=layout)
        kept = allocate(mlps, scores, request, budget)
        assert [len(kept[site.key]) for site in mlps] == widths


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.REPRESENTATIVE)
def test_a_timed_decoding_step_is_that_of_the_model(name):
    """Layer 0 gets the token after a prompt, and the same tokens before it, however often it runs."""
    model = tiny.make_model(name)
    ids = torch.randint(tiny.VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    calls = Calls.of(model, "decode", ids)
    seen = []
    (_, layer), *_ = get_architecture(model.config).layers(model)
    handle = layer.register_forward_hook(lambda _module, args, output: seen.extend((args[0], output)))
    model(torch.cat([ids, ids[:, -1:]], dim=1), use_cache=False)
    handle.remove()
    expected = (seen[1][0] if isinstance(seen[1], tuple) else seen[1])[:, -1:]
    # Learned positions are added before the layers.
    run = dataclasses.replace(calls, hidden=seen[0][:, -1:]).run_of(layer, 0, 0)
    for _ in range(3):
        output = run()
        torch.testing.assert_close(output[0] if isinstance(output, tuple) else output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", tiny.REPRESENTATIVE)
def test_decoding_is_timed_at_every_width(name, monkeypatch):
    model = tiny.make_model(name)
    timed = []

    def seconds(runs, repeats, device):
        assert all(run() is not None for run in runs)
        timed.append([run.times for run in runs])
        return tiny.counted_seconds(runs, repeats, device)

    monkeypatch.setattr(timing, "median_seconds", seconds)
    unit = "kv_group" if name == "llama_gqa_biases" else "query_head"
    subject = Subject.of(model, unit)
    table = load_or_measure(subject, request_of(speed_of="decode", attention_unit=unit))
    latencies = table.phases["decode"]
    for site in subject.sites:
        assert latencies.seconds(site) == pytest.approx(1e-9 * site.all_parameters, rel=0.1)
    # All layers of a tiny model run one after the other, since a cache holds one.
    assert timed[0] == [3] * len(timed[0])


@pytest.mark.parametrize(
    ("kinds", "speed_of"),
    [
        (["layer"], "prefill"),
        (["sublayer"], "decode"),
        (["layer", "mlp"], "prefill:0.3,decode:0.7"),
        (["sublayer", "attention", "mlp"], "decode"),
    ],
)
def test_layers_and_sublayers_are_removed_for_a_speed_up(kinds, speed_of, tokens, clock):
    """The clock counts parameters, so that every phase gains what the parameters lose."""
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", num_hidden_layers=5))
    alone = len(kinds) == 1
    depth = {"method": "random"} if alone else {"method": "magnitude", "depth_method": "random", "depth_sparsity": 0.2}
    request = PruningConfig(
        **depth, kinds=kinds, target_speedup=1.5, speed_of=speed_of, latency_tokens=PROMPT, reconstruction="none"
    )
    pruner.prune(request, tokens)
    speedup, outcome = pruner.report.speedup, pruner.report
    ratio = outcome.parameters_before / outcome.parameters_after
    assert speedup.predicted == pytest.approx(ratio, rel=2e-3) and speedup.measured == pytest.approx(ratio, rel=1e-6)
    # The largest unit of this model is a tenth of it.
    assert 1.5 <= speedup.predicted < (1.9 if alone else 1.51)
    assert any(not units for units in pruner.plan.kept.values())


def test_a_search_finds_layers_for_a_speed_up(tokens, clock):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", num_hidden_layers=5))
    pruner.prune(
        PruningConfig(
            kinds=["sublayer", "mlp"],
            scope="search",
            search_windows=300,
            target_speedup=2.5,
            latency_tokens=PROMPT,
            reconstruction="none",
        ),
        tokens,
    )
    assert 2.5 <= pruner.report.speedup.predicted < 2.6


def test_a_layer_saves_more_than_its_sublayers(llama_sites):
    """What a layer costs beside them is saved with the last of them."""
    curves = {shape_of(site): [(site.num_units, 0.1)] for site in llama_sites}
    cost = LatencyCost(made_up(curves, layer_seconds=0.05))
    attention, mlp, other, *_ = llama_sites
    for gone, seconds in (([attention], 0.1), ([attention, mlp], 0.25), ([mlp, other], 0.2)):
        assert cost.whole(gone, llama_sites) == pytest.approx(seconds * 1e12, rel=1e-6)
    # The sublayer that is left of a pruned layer is the layer.
    assert cost.whole([mlp], llama_sites[1:]) == pytest.approx(0.15e12, rel=1e-6)


def test_phases_add_up_by_their_shares(llama_sites):
    """Three parts of ten in a prefill that becomes twice as fast, the others in a decoding step that stays."""
    mlps = [site for site in llama_sites if site.kind == "mlp"]
    shape = shape_of(mlps[0])
    prefill, decode = made_up({shape: [(64, 1 / 6)]}), made_up({shape: [(64, 0.0)]}, model_seconds=0.01)
    table = LatencyTable({"prefill": prefill, "decode": decode}, {})
    latencies = table.combined({"prefill": 0.3, "decode": 0.7})
    cost = LatencyCost(latencies)
    assert latencies.model_seconds == pytest.approx(1)
    assert cost.speedup(cost.whole(mlps, llama_sites)) == pytest.approx(1 / (0.3 * 0.5 + 0.7), rel=1e-6)


@pytest.mark.parametrize("rounds", [1, 2, 8])
def test_rounds_do_not_overshoot_on_the_way(rounds, clock):
    """Rounded to the nearest in every round and layer, eight rounds would cut all eight layers, for 1.13."""
    pruner = FwdPruner(tiny.make_model("llama_mha_tied", num_hidden_layers=8))
    request = request_of(target_speedup=1.07, method="magnitude", reconstruction="none", kinds=["mlp"], multiple_of=16)
    pruner.prune(dataclasses.replace(request, rounds=rounds))
    assert [len(pruner.plan.kept[(layer, "mlp")]) for layer in range(8)].count(48) == 5
    assert pruner.report.speedup.predicted == pytest.approx(1.0762, abs=1e-4)


def test_a_query_head_that_is_the_last_stays_in_later_rounds(clock):
    """Under multi-query attention it would be a KV group, which no table of query heads knows."""
    request = request_of(target_speedup=1.5, method="magnitude", reconstruction="none", scope="global", budget="joint")
    pruner = FwdPruner(tiny.make_model("llama_mqa"))
    pruner.prune(dataclasses.replace(request, rounds=2))
    assert pruner.report.speedup.predicted >= 1.5
    assert any(len(pruner.plan.kept[(layer, "attention")]) == 1 for layer in range(3))


@pytest.mark.parametrize("seed", range(6))
def test_layers_are_cut_alike_whatever_the_table(seed, monkeypatch):
    """Which width is worth it depends on the scores, and those on the layer."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(*about):
        counted = tiny.counted_seconds(*about)
        return [each * (1 + 0.2 * float(torch.rand((), generator=generator))) for each in counted]

    monkeypatch.setattr(timing, "median_seconds", noisy)
    pruner = FwdPruner(tiny.make_model("llama_mha_tied", seed=seed))
    pruner.prune(request_of(method="magnitude", reconstruction="none", layout="stock", budget="joint"))
    for kind in ("attention", "mlp"):
        assert len({len(pruner.plan.kept[(layer, kind)]) for layer in range(3)}) == 1
    assert pruner.report.speedup.predicted >= 1.2


def test_a_width_that_is_slower_than_a_larger_one_saves_nothing():
    site = find_sites(tiny.make_model("llama_mha_tied"))[1]
    latencies = made_up({shape_of(site): [(16, 0.2), (32, 0.5), (48, 0.4), (64, 0.6)]})
    cost = LatencyCost(latencies).of(site, torch.tensor([16, 32, 40, 48, 64]))
    assert cost.tolist() == [16, int(0.3e12) + 32, int(0.3e12) + 40, int(0.3e12) + 48, int(0.4e12) + 64]


def test_multiples_are_respected(tokens, clock):
    pruner = FwdPruner(tiny.make_model("llama_mha_tied"))
    pruner.prune(request_of(multiple_of=24), tokens)
    widths = {len(pruner.plan.kept[(layer, "mlp")]) for layer in range(3)}
    assert all(width % 24 == 0 or width == 64 for width in widths)


def test_a_table_is_measured_once_and_kept(tokens, clock, tmp_path, monkeypatch):
    file = tmp_path / "tables" / "latency.json"
    model = tiny.make_model("llama_mha_tied")
    FwdPruner(model).prune(request_of(latency_table=str(file)), tokens, inplace=False)
    kept = json.loads(file.read_text())
    assert kept["prefill"]["tokens"] == PROMPT and kept["measured_on"]["machine"]["dtype"] == "torch.float32"

    monkeypatch.setattr(timing, "timed_runs", lambda *_: pytest.fail("measured again"))
    pruner = FwdPruner(model)
    pruner.prune(request_of(latency_table=str(file)), tokens, inplace=False)
    assert pruner.report.speedup.predicted >= 1.2
    # The request that it keeps is the user's, which asks for the same again.
    assert pruner.config == request_of(latency_table=str(file), n_samples=len(tokens))
    with pytest.raises(
        ValueError, match="of prefill it holds those of latency_tokens=16, and this request is for latency_tokens=8"
    ):
        FwdPruner(model).prune(request_of(latency_table=str(file), latency_tokens=8), tokens)
    file.write_text("{}")
    with pytest.raises(ValueError, match="is no latency table"):
        FwdPruner(model).prune(request_of(latency_table=str(file)), tokens)


def test_a_file_gains_the_phase_that_it_lacks(tokens, clock, tmp_path):
    file, model = tmp_path / "latency.json", tiny.make_model("llama_mha_tied")
    for speed_of in ("prefill", "decode"):
        request = request_of(speed_of=speed_of, latency_table=str(file))
        FwdPruner(model).prune(request, tokens, inplace=False)
    assert json.loads(file.read_text()).keys() == {"measured_on", "prefill", "decode"}
    with pytest.raises(ValueError, match=r"of decode it holds those of latency_context=16, and .* latency_context=9"):
        FwdPruner(model).prune(dataclasses.replace(request, latency_context=9), tokens)


def test_a_table_of_another_program_is_used_for_its_model_alone(tokens, clock, tmp_path):
    file, model = tmp_path / "latency.json", tiny.make_model("llama_mha_tied")
    FwdPruner(model).prune(request_of(latency_table=str(file)), tokens, inplace=False)
    table = json.loads(file.read_text())
    table["measured_on"] |= {"runtime": "llama.cpp", "machine": {"device": "another"}, "multiple_of": 1}
    file.write_text(json.dumps(table))
    pruner = FwdPruner(model)
    pruner.prune(request_of(latency_table=str(file)), tokens, inplace=False)
    assert pruner.report.speedup.predicted >= 1.2 and pruner.report.speedup.measured is None
    assert "not measured" in str(pruner.report)
    with pytest.raises(ValueError, match="of the latencies of decode it holds none"):
        FwdPruner(model).prune(request_of(latency_table=str(file), speed_of="decode"), tokens)
    other = tiny.make_model("llama_mha_tied", num_hidden_layers=2)
    with pytest.raises(ValueError, match="its layers is 3, this one's is 2"):
        FwdPruner(other).prune(request_of(latency_table=str(file)), tokens)


def test_scores_and_what_is_pruned_by_them_share_a_table(tokens, clock, tmp_path, monkeypatch):
    pruner = FwdPruner(tiny.make_model("llama_mha_tied"))
    scores = pruner.score(request_of(), tokens)
    monkeypatch.setattr(timing, "timed_runs", lambda *_: pytest.fail("measured again"))
    file = tmp_path / "latency.json"
    pruner.prune(request_of(latency_table=str(file)), scores=scores)
    assert pruner.report.speedup.predicted >= 1.2 and file.exists()


def test_timed_layers_hold_their_own_weights(dense):
    """Matrices that share memory would be read from a cache."""
    sites = find_sites(dense)
    for site in sites[:2]:
        copies = LayerCopies(Subject(dense, sites), site, 2)
        for layers in (copies.of(range(site.num_groups), set()), copies.of(range(site.num_units), set())):
            layer = torch.nn.ModuleList(layers)
            spans = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in layer.parameters())
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_table_of_the_dense_model_is_not_one_of_the_pruned(tokens, clock, tmp_path):
    file = str(tmp_path / "latency.json")
    pruner = FwdPruner(tiny.make_model("llama_mha_tied"))
    pruner.prune(request_of(latency_table=file, skip_layers=[0]), tokens)
    with pytest.raises(
        ValueError,
        match="was measured under other conditions: its model_type is 'llama', this one's is 'pruned_llama'",
    ):
        FwdPruner(pruner.model).prune(request_of(latency_table=file), tokens)


@pytest.mark.parametrize(("seconds", "warns"), [(1.0, False), (1.2, False), (0.7, True), (1.4, True)])
def test_a_table_whose_layers_do_not_make_up_the_model_is_warned_of(llama_sites, caplog, seconds, warns):
    layer = seconds / 3
    curves = {shape_of(site): [(site.num_units, 0.4 * layer)] for site in llama_sites}
    with caplog.at_level(logging.WARNING):
        timing.warn_of_disagreement(made_up(curves, layer_seconds=0.2 * layer), llama_sites, 1.0)
    assert ("the machine was busy" in caplog.text) == warns
    assert (f"add up to {seconds:.3g} s and the model's is 1 s" in caplog.text) == warns


def test_where_a_table_cannot_be_written_nothing_is_measured(tokens, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(timing, "timed_runs", lambda *_: pytest.fail("measured"))
    with pytest.raises(OSError, match="Cannot write beside"):
        FwdPruner(tiny.make_model("llama_mha_tied")).prune(
            request_of(latency_table=str(tmp_path / "file" / "latency.json")), tokens
        )


def test_rounds_and_searches_spend_time_too(tokens, clock):
    for fields in ({"rounds": 2}, {"scope": "search", "search_windows": 16, "rounds": 2}):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        pruner.prune(request_of(**fields), tokens)
        assert pruner.report.speedup.predicted >= 1.2
        assert pruner.report.requested_sparsity is None
        assert "predicted" in str(pruner.report) and math.isfinite(pruner.report.speedup.measured)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_speedup": 0.9}, "target_speedup must be at least 1; got 0.9"),
        ({"target_speedup": 2.0, "target_bytes": 10}, "target_bytes and target_speedup are two budgets"),
        ({"target_speedup": 2.0, "mlp_sparsity": 0.1}, "are two budgets"),
        ({"target_speedup": math.inf}, "target_speedup must be a finite number; got inf"),
        ({"latency_tokens": 0}, "latency_tokens must be at least 1; got 0"),
        ({"latency_context": 0}, "latency_context must be at least 1; got 0"),
        ({"speed_of": "decoded"}, "must be prefill or decode, .* 'decoded' is no phase. Did you mean decode"),
        ({"speed_of": "prefill:1,prefill:2"}, "prefill occurs twice"),
        ({"speed_of": "prefill:0.5,decode:x"}, "'x' is no number"),
        ({"speed_of": "prefill:0.5,decode:0"}, "must be above 0"),
    ],
)
def test_bad_requests(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.request(**fields)


def test_what_cannot_be_had_is_refused_in_the_users_words(tokens, clock):
    with pytest.raises(ValueError, match=r"A speed-up of 50 is more than .* the largest possible speed-up is 3\."):
        FwdPruner(tiny.make_model("llama_mha_tied")).prune(request_of(target_speedup=50.0), tokens)
    with pytest.raises(ValueError, match="latency_tokens=1000 is more than the 128 positions"):
        FwdPruner(tiny.make_model("llama_mha_tied")).prune(request_of(latency_tokens=1000), tokens)


def test_budgets_of_parameters_stay_what_they_were():
    sites = find_sites(tiny.make_model("llama_mha_tied"))
    assert Budget(5).cost.total(sites[0]) == sites[0].num_parameters


def test_a_speed_up_out_of_reach_names_no_multiple_that_nobody_set(tokens, monkeypatch):
    monkeypatch.setattr(timing, "median_seconds", tiny.counted_seconds)
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", intermediate_size=128))

    with pytest.raises(ValueError, match=r"MLP widths in multiples of .* which are those that were timed") as refusal:
        pruner.prune(dataset=tokens, target_speedup=9, latency_tokens=16)
    assert "multiple_of" not in str(refusal.value)


def test_layers_that_take_longer_than_the_model_leave_a_finite_speed_up():
    assert LatencyCost(made_up({})).speedup(1.5e12) == pytest.approx(1 / SMALLEST_REST)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_layer_that_lost_its_attention_is_timed_as_it_is(phase, clock):
    dense = tiny.make_model("llama_gqa_biases")
    counts = {site.key: site.num_units for site in find_sites(dense)}
    kept = {key: [] if key == (0, "attention") else list(range(count)) for key, count in counts.items()}
    plan = PruningPlan(kept, counts, "llama", "query_head")
    subject = Subject.of(FwdPruner(dense).prune(plan=plan, reconstruction="none"))
    latencies = load_or_measure(subject, request_of(speed_of=phase)).phases[phase]

    for site in subject.sites:
        assert latencies.seconds(site) == pytest.approx(1e-9 * site.all_parameters, rel=0.1)
