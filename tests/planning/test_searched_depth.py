"""Searches that may remove whole layers and sublayers beside heads and channels."""

import pytest
import tiny
import torch
import transformers

from optimum_fwdprune import Calibration, FwdPruner, PruningConfig, find_sites
from optimum_fwdprune.forward.divergence import Divergence
from optimum_fwdprune.forward.gates import kept_projection
from optimum_fwdprune.loading.subject import Subject
from optimum_fwdprune.planning import search


def request_of(**fields):
    return PruningConfig(
        **{
            "scope": "search",
            "kinds": ["layer", "mlp"],
            "sparsity": 0.3,
            "search_windows": 400,
            "reconstruction": "none",
            **fields,
        }
    )


def deep_model(dead=()):
    """A model of five layers; the attention and MLP of those that are dead write nothing."""
    model = tiny.make_model("llama_gqa_biases", num_hidden_layers=5)
    for layer in dead:
        for linear in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
            linear.weight.data.zero_()
            if linear.bias is not None:
                linear.bias.data.zero_()
    return model


def gone_of(pruner):
    return {tuple(key) for key, kept in pruner.plan.kept.items() if not kept}


@pytest.fixture(scope="module")
def trained():
    """A model of a few seconds' training on Python's documentation, and windows of the text."""
    from pydoc_data.topics import topics

    ids = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=48,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(150):
        batch = windows[torch.randint(len(windows), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), windows[:48]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_mixed_search_is_no_worse_than_widths_alone_and_layers_alone(trained, layers):
    """At the same number of parameters, by the divergence from the dense model on the windows of the search."""
    model, windows = trained
    judged = Calibration(windows[7::8])
    divergence = Divergence(Subject.of(model), judged, 8)
    shared = {"reconstruction": "none", "sparsity": layers / 4}
    requests = {
        "widths": {"scope": "search", "kinds": ["mlp", "attention"], "budget": "joint", "search_windows": 3000},
        "layers": {"method": "removal_loss", "kinds": ["layer"]},
        "mixed": {
            "scope": "search",
            "kinds": ["layer", "mlp", "attention"],
            "budget": "joint",
            "depth_method": "removal_loss",
            "search_windows": 3000,
        },
    }
    measured, parameters = {}, {}
    for name, fields in requests.items():
        pruner = FwdPruner(model)
        pruner.prune(PruningConfig(**shared, **fields), windows, inplace=False)
        sites = {site.key: site for site in find_sites(model)}
        kept = {key: kept_projection(sites[key], units) for key, units in pruner.plan.kept.items()}
        measured[name] = divergence.of(kept)
        parameters[name] = sum(len(units) * sites[key].unit_parameters for key, units in pruner.plan.kept.items())

    assert parameters["mixed"] == pytest.approx(parameters["layers"], rel=0.01)
    assert parameters["mixed"] == pytest.approx(parameters["widths"], rel=0.01)
    assert measured["mixed"] <= 1.001 * min(measured["widths"], measured["layers"])


@pytest.mark.parametrize("kind", ["layer", "sublayer"])
@pytest.mark.parametrize("seed", [0, 1])
def test_layers_that_write_nothing_go_whatever_their_scores(tokens, kind, seed):
    """Layer 3 writes nothing. A fifth of the parameters are in it, so that no channel of the others has to go."""
    pruner = FwdPruner(deep_model(dead=[3]))
    request = request_of(kinds=[kind, "mlp"], sparsity=0.2, depth_method="random", seed=seed, search_windows=900)
    pruner.prune(request, tokens)
    kept, sizes = pruner.plan.kept, pruner.plan.num_units

    assert gone_of(pruner) == {(3, "attention"), (3, "mlp")}
    assert all(len(kept[key]) == sizes[key] for key in kept if key.layer != 3)
    details = pruner.plan.metadata["scoring"]["search"]
    assert details["removed"] == (["layer 3"] if kind == "layer" else ["attention of layer 3", "mlp of layer 3"])
    assert details["divergence"] == pytest.approx(0, abs=1e-4) and details["even_divergence"] > 1e-3
    assert pruner.report.masked_difference < 1e-4


def test_the_history_counts_what_went_with_layers(tokens):
    pruner = FwdPruner(deep_model(dead=[3]))
    pruner.prune(request_of(sparsity=0.2, depth_method="random"), tokens, inplace=False)
    history = pruner.scores.history

    assert history["keep_rate.3.mlp"][-1] == 0
    assert history["expected_sparsity"] == pytest.approx([0.2] * len(history["loss"]), abs=0.02)
    assert (history["loss"].diff() <= 0).all()


def test_layers_stay_where_removing_them_costs_more(tokens, monkeypatch):
    """A divergence that grows with the square of what every site loses: the even share is best."""

    def lost(self, projections, first, record):
        kept = ((site, projections.get(site.key)) for site in self._sites)
        return sum((1 - len(new.kept) / site.num_units) ** 2 for site, new in kept if new is not None)

    monkeypatch.setattr(Divergence, "_measure", lost)
    pruner = FwdPruner(deep_model())
    pruner.prune(request_of(kinds=["layer", "attention", "mlp"]), tokens)

    assert not gone_of(pruner)
    assert pruner.report.sparsity == pytest.approx(0.3, abs=0.02)


def test_a_number_of_layers_that_is_set_is_kept_to(tokens):
    pruner = FwdPruner(deep_model(dead=[3]))
    pruner.prune(request_of(depth_sparsity=0.2, sparsity=0.3, depth_method="random", seed=1), tokens)
    lost = min(range(5), key=lambda layer: float(pruner.scores.values[layer, "layer"]))

    assert gone_of(pruner) == {(lost, "attention"), (lost, "mlp")}
    assert pruner.report.sparsity == pytest.approx(0.3, abs=0.02)


def test_a_search_that_channels_alone_cannot_satisfy_removes_layers(tokens):
    pruner = FwdPruner(deep_model())
    pruner.prune(request_of(sparsity=0.8, depth_method="random"), tokens)

    assert len(gone_of(pruner)) >= 2
    assert pruner.report.sparsity == pytest.approx(0.8, abs=0.02)


def test_layers_that_are_skipped_stay(tokens):
    pruner = FwdPruner(deep_model(dead=[3]))
    pruner.prune(request_of(skip_layers=[3], sparsity=0.2), tokens)

    assert not {key for key in gone_of(pruner) if key[0] == 3}


def test_it_passes_no_more_windows_than_it_was_given(tokens, monkeypatch):
    passed = []
    through = Divergence._through

    def counted(self, batch, hidden, first, record):
        passed.append(len(hidden) * (5 - first) / 5)
        return through(self, batch, hidden, first, record)

    monkeypatch.setattr(Divergence, "_through", counted)
    for allowed in (40, 300):
        passed.clear()
        pruner = FwdPruner(deep_model())
        pruner.prune(request_of(search_windows=allowed), tokens)
        assert sum(passed) <= pruner.plan.metadata["scoring"]["search"]["windows"] <= allowed
    with pytest.raises(ValueError, match="too small to try 5 sites and 5 layers and 7 moves on one window"):
        FwdPruner(deep_model()).prune(request_of(search_windows=8), tokens)


def test_a_search_that_was_killed_resumes_with_the_layers_that_were_gone(tokens, tmp_path, monkeypatch):
    def run(**fields):
        pruner = FwdPruner(deep_model(dead=[3]))
        pruner.prune(request_of(depth_method="random", seed=1, search_windows=900, **fields), tokens)
        return pruner

    whole = run()
    assert whole.plan.metadata["scoring"]["search"]["sweeps"] > 2
    move = search.Descent._move

    def killed(self, state):
        if state.sweeps == 2:
            raise SystemExit
        return move(self, state)

    monkeypatch.setattr(search.Descent, "_move", killed)
    with pytest.raises(SystemExit):
        run(resume=str(tmp_path))
    monkeypatch.setattr(search.Descent, "_move", move)
    resumed = run(resume=str(tmp_path))

    assert resumed.plan.kept == whole.plan.kept
    assert resumed.plan.metadata["scoring"]["search"] == whole.plan.metadata["scoring"]["search"]
