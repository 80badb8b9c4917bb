"""Which layers sequential least squares runs: nothing is computed twice where it can be kept or is known."""

import pytest
import tiny
import torch

from optimum_fwdprune import FwdPruner, find_sites
from optimum_fwdprune.reconstruction.layer_fit import LayerFit
from optimum_fwdprune.reconstruction.streams import Stream


def pruned(model, tokens, **fields):
    request = tiny.request(**{"sparsity": 0.4, "reconstruction": "least_squares", "kinds": ["mlp"], **fields})
    return FwdPruner(model).prune(request, tokens, inplace=False)


@pytest.fixture
def llama():
    return tiny.make_model("llama_gqa_biases")


def test_layers_before_the_first_change_are_run_in_the_dense_model_alone(llama, tokens, monkeypatch):
    left, request = [], {"skip_layers": [0, 1], "sparsity": 0.1}
    expected = pruned(llama, tokens, **request)(tokens).logits
    leave = Stream.leave

    def spy(stream, sites, projections):
        left.append(sites[0].layer)
        leave(stream, sites, projections)

    monkeypatch.setattr(Stream, "leave", spy)
    pruned(llama, tokens, **request)
    assert set(left) == {2}

    # The same weights as with a run of every layer.
    monkeypatch.setattr(
        Stream,
        "follow_dense",
        lambda stream, layer: leave(stream, [site for site in find_sites(llama) if site.layer == layer], {}),
    )
    assert torch.equal(pruned(llama, tokens, **request)(tokens).logits, expected)


@pytest.mark.parametrize("refit_sources", [False, True])
def test_features_of_the_last_site_are_stored_for_the_rest_of_the_layer(tokens, monkeypatch, refit_sources):
    """As many windows as take no more memory than hidden states; what is stored changes nothing."""
    model, request = tiny.make_model("gpt2"), {"refit_sources": refit_sources, "batch_size": 1, "sparsity": 0.2}
    stored = {}
    leave = Stream.leave

    def spy(stream, sites, projections):
        stored.setdefault(sites[0].layer, []).append(sites[-1].key in stream._with_features)
        leave(stream, sites, projections)

    monkeypatch.setattr(Stream, "leave", spy)
    found = pruned(model, tokens, **request)
    kept = {site.key: site.num_units for site in find_sites(found)}
    assert kept[0, "mlp"] > model.config.hidden_size
    for layer, of_layer in stored.items():
        assert sum(of_layer) <= len(of_layer) * model.config.hidden_size / kept[layer, "mlp"]
        # Features that may still be bent are not stored, and here no bending lowers the error.
        assert any(of_layer) != refit_sources

    monkeypatch.setattr(LayerFit, "_kept_streams", lambda fit, place: set())
    assert torch.equal(pruned(model, tokens, **request)(tokens).logits, found(tokens).logits)
