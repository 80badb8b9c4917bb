"""MINI-LLM and Taylor against plain loops over their formulas, and what their options do."""

import copy
import gc

import numpy as np
import pytest
import tiny
import torch

from optimum_fwdprune import Calibration, FwdPruner, find_sites
from optimum_fwdprune.scoring.gradients.perturbation import Noise, WeightPerturbation
from optimum_fwdprune.scoring.gradients.zeroth_order import Sampling, draw_slopes
from optimum_fwdprune.scoring.scores import Scores


@pytest.fixture(params=["kv_group", "query_head"])
def unit(request):
    return request.param


def score(model, tokens, unit="query_head", **fields):
    config = tiny.request(**{"method": "mini_llm", "attention_unit": unit, **fields})
    return FwdPruner(model).score(config, tokens)


def owned_entries(site):
    """For every unit the entries it owns: `(coupling, parameter name, positions along the axis)`."""
    everything = {coupling: set(range(coupling.linear.weight.shape[coupling.axis])) for coupling in site.couplings}
    for index in range(site.num_units):
        others = [other for other in range(site.num_units) if other != index]
        yield [
            (coupling, name, sorted(everything[coupling] - set(coupling.kept_index(site.num_units, others).tolist())))
            for coupling in site.couplings
            for name, _ in coupling.parameters()
        ]


def numpy_of(model, tokens, unit):
    """Weights, exact gradients and ‖X‖ of every linear, by name, in numpy."""
    reference = copy.deepcopy(model)
    inputs, handles = {}, []
    linears = {c.name: c.linear for site in find_sites(reference, unit) for c in site.couplings}
    for name, linear in linears.items():
        hook = lambda _module, args, name=name: inputs.update({name: args[0].detach().flatten(0, -2)})  # noqa: E731
        handles.append(linear.register_forward_pre_hook(hook))
    reference(input_ids=tokens, labels=tokens).loss.backward()
    return {
        name: {
            "weight": (linear.weight.detach().double().numpy(), linear.weight.grad.double().numpy()),
            "bias": linear.bias is not None
            and (linear.bias.detach().double().numpy(), linear.bias.grad.double().numpy()),
            "norm": np.linalg.norm(inputs[name].double().numpy(), axis=0),
            "tokens": len(inputs[name]),
        }
        for name, linear in linears.items()
    }


def sensitivities(known, coupling, name, positions, gradient=None):
    """|W · g| · ‖X‖ of the entries at some positions of a parameter."""
    values, exact = known[coupling.name][name]
    gradient = exact if gradient is None else np.ones_like(values)
    if name == "bias":
        return np.abs(values * gradient)[positions] * np.sqrt(known[coupling.name]["tokens"])
    entries = np.abs(values * gradient) * known[coupling.name]["norm"][None, :]
    return np.take(entries, positions, axis=coupling.axis)


AGGREGATES = {
    "sum": lambda entries: sum(part.sum() for part in entries),
    "mean": lambda entries: np.mean(np.concatenate([part.ravel() for part in entries])),
    "l2": lambda entries: np.sqrt(sum(np.square(part).sum() for part in entries)),
}


@pytest.mark.parametrize(
    *tiny.crossed(unit=["kv_group", "query_head"], gradient=["exact", "ones"], aggregation=[*AGGREGATES])
)
def test_feature_map_sensitivity(dense, tokens, unit, gradient, aggregation):
    """Σ |W · ∂L/∂W| · ‖X‖ over source rows, their biases, and projection columns."""
    scores = score(dense, tokens, unit, gradient=gradient, aggregation=aggregation).values
    known = numpy_of(dense, tokens, unit)
    for site in find_sites(dense, unit):
        expected = [
            AGGREGATES[aggregation](
                [sensitivities(known, *entry, gradient=None if gradient == "exact" else 1) for entry in entries]
            )
            for entries in owned_entries(site)
        ]
        np.testing.assert_allclose(scores[site.key], expected, rtol=2e-3, atol=1e-5 * max(expected))


@pytest.mark.parametrize("salience", ["vector", "element"])
def test_taylor(dense, tokens, unit, salience):
    config = tiny.request(method="taylor", salience=salience, attention_unit=unit)
    scores = FwdPruner(dense).score(config, tokens).values
    known = numpy_of(dense, tokens, unit)
    for site in find_sites(dense, unit):
        expected = []
        for entries in owned_entries(site):
            products = [
                np.take(
                    np.multiply(*known[coupling.name][name]), positions, axis=coupling.axis if name == "weight" else 0
                )
                for coupling, name, positions in entries
            ]
            products = products if salience == "vector" else [np.abs(product) for product in products]
            expected.append(abs(sum(product.sum() for product in products)))
        np.testing.assert_allclose(scores[site.key], expected, rtol=5e-3, atol=1e-4 * max(expected))


def test_zeroth_order_scores_are_those_of_the_mean_of_slope_times_noise(dense, tokens):
    scores = score(dense, tokens, draws=3, epsilon=1e-2, noise="gaussian", windows_per_draw=5, seed=7)
    sites = find_sites(dense)
    perturbation = WeightPerturbation(sites, Noise(7, "gaussian"))
    sampling = Sampling(draws=3, epsilon=1e-2, windows_per_draw=5, batch_size=8)
    draws = draw_slopes(dense, perturbation, Calibration(tokens), sampling)
    known = numpy_of(dense, tokens, "query_head")
    index = 0
    for site in sites:
        for coupling in site.couplings:
            for name, _ in coupling.parameters():
                slopes = zip(draws.slopes.tolist(), draws.indices)
                gradient = sum(slope * perturbation.noise(draw, index).double().numpy() for slope, draw in slopes) / 3
                known[coupling.name][name] = (known[coupling.name][name][0], gradient)
                index += 1
        expected = [
            AGGREGATES["sum"]([sensitivities(known, *entry) for entry in entries]) for entries in owned_entries(site)
        ]
        np.testing.assert_allclose(scores.values[site.key], expected, rtol=2e-3)


def test_unit_scores_are_gate_gradients_times_activation_norms(dense, tokens, unit):
    exact = score(dense, tokens, unit, gradient="exact", perturb="units").values
    known = numpy_of(dense, tokens, unit)
    for site in find_sites(dense, unit):
        weight, gradient = known[site.output_name]["weight"]
        columns = (weight * gradient).sum(0).reshape(site.num_units, -1).sum(1)
        norms = np.linalg.norm(known[site.output_name]["norm"].reshape(site.num_units, -1), axis=1)
        expected = np.abs(columns) * norms
        np.testing.assert_allclose(exact[site.key], expected, rtol=2e-2, atol=1e-3 * max(expected))


@pytest.mark.parametrize("perturb", ["weights", "units"])
def test_the_controls_know_the_seed_and_not_the_loss(tokens, perturb):
    model = tiny.make_model("llama_gqa_biases")
    first, again, other = (
        score(model, tokens, gradient="random", perturb=perturb, seed=seed).values for seed in (1, 1, 2)
    )
    ones = score(model, tokens, gradient="ones", perturb=perturb)

    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)
    assert ones.standard_errors == {} and ones.details == {}


@pytest.mark.parametrize("perturb", ["weights", "units"])
def test_more_draws_come_closer_to_the_exact_scores(perturb):
    """On a model small enough to draw often."""
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = tiny.make_model("llama_gqa_biases", dtype=torch.float64, num_key_value_heads=1, vocab_size=40, **sizes)
    tokens = torch.randint(0, 40, (8, 12), generator=torch.Generator().manual_seed(1))
    exact = score(model, tokens, gradient="exact", perturb=perturb).values[0, "mlp"]

    def correlation(draws):
        options = {"draws": draws, "windows_per_draw": 8, "batch_size": 512, "epsilon": 1e-4}
        found = score(model, tokens, perturb=perturb, **options).values[0, "mlp"]
        return float(torch.corrcoef(torch.stack([found, exact]))[0, 1])

    many = correlation(4000)
    assert many > 0.95 and many > correlation(8)


def test_what_was_drawn_is_in_the_plan_and_in_the_scores_file(tokens, tmp_path):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(tiny.request(method="mini_llm", draws=8, sparsity=0.3), tokens)
    pruner.scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")
    details = pruner.plan.metadata["scoring"]

    assert (details["draws"], details["rejected_draws"], details["stopped_early"]) == (8, 0, False)
    assert details["epsilon"] == 1e-3
    assert 0 < details["rounding_floor"] < details["slope_size"]
    assert loaded.details == details
    for key, errors in pruner.scores.standard_errors.items():
        assert torch.equal(loaded.standard_errors[key], errors)
        assert (errors > 0).all() and errors.shape == pruner.scores.values[key].shape


def test_scores_bring_the_options_that_they_were_made_with(tokens):
    """They, and not the defaults of the request, say how scores of different layers compare."""
    made = tiny.request(method="mini_llm", draws=4, aggregation="l2", scope="global", budget="joint", sparsity=0.4)
    plans = []
    for asked in (made, tiny.request(method="mini_llm", scope="global", budget="joint", sparsity=0.4)):
        pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
        scores = FwdPruner(pruner.model).score(made, tokens)
        pruner.prune(asked, scores=scores)
        plans.append(pruner.plan.kept)
        assert (pruner.config.aggregation, pruner.config.draws) == ("l2", 4)
    assert plans[0] == plans[1]


def test_scoring_holds_a_handful_of_copies_of_one_linear(tokens, monkeypatch):
    """Never a gradient of the size of the model: the parts that standard errors need, and three more."""
    from optimum_fwdprune.architectures import Site

    # What other tests left need not be looked through at every step.
    gc.collect()
    gc.freeze()
    model = tiny.make_model("llama_gqa_biases", intermediate_size=1000)
    size, held = 1000 * 48, []
    sum_owned = Site.sum_owned

    def counting(self, *arguments):
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if issubclass(type(tensor), torch.Tensor)
        }
        held.append(sum(bytes for bytes in storages.values() if bytes % (4 * size) == 0) / (4 * size))
        return sum_owned(self, *arguments)

    weights = sum(linear.weight.numel() == size for linear in model.modules() if isinstance(linear, torch.nn.Linear))
    monkeypatch.setattr(Site, "sum_owned", counting)
    try:
        score(model, tokens, draws=16)
    finally:
        gc.unfreeze()

    assert weights == 9 and 8 <= max(held) - weights <= 8 + 3


def test_drawing_stops_once_the_kept_set_is_settled(tokens):
    """With a margin between the units the set settles early; the draws made are those of a shorter run."""
    model = tiny.make_model("llama_mha_tied", intermediate_size=8)
    with torch.no_grad():
        for layer in model.model.layers:
            # Half of the channels and heads do nearly nothing.
            layer.mlp.down_proj.weight[:, 4:] *= 1e-4
            layer.mlp.up_proj.weight[4:] *= 1e-4
            layer.mlp.gate_proj.weight[4:] *= 1e-4
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight[24:] *= 1e-4
            layer.self_attn.o_proj.weight[:, 24:] *= 1e-4
    stopped = score(model, tokens, draws=50, stop_after=4, sparsity=0.5)
    whole = score(model, tokens, draws=8, sparsity=0.5)

    assert stopped.details["stopped_early"] and stopped.details["draws"] == 8
    assert all(torch.equal(stopped.values[key], whole.values[key]) for key in whole.values)
    assert score(model, tokens, draws=8, stop_after=8, sparsity=0.5).details["stopped_early"] is False


@pytest.mark.parametrize("perturb", ["weights", "units"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_draw_leaves_every_weight_bit_identical(dense, tokens, dtype, perturb, monkeypatch):
    dense.to(dtype)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    calls = []

    def interrupt(*_):
        calls.append(1)
        # The statistics pass and the first draws go through; the third draw breaks off halfway.
        if len(calls) == 5:
            raise KeyboardInterrupt

    middle = find_sites(dense)[3].projection.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        score(dense.train(), tokens, perturb=perturb, draws=9, windows_per_draw=4, epsilon=0.05)
    middle.remove()

    assert dense.training
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in dense.modules())
    assert not any("forward" in vars(module) for module in dense.modules())


@pytest.mark.parametrize("perturb", ["weights", "units"])
def test_nothing_is_kept_for_gradients(tokens, perturb, monkeypatch):
    model = tiny.make_model("llama_gqa_biases")
    recorded = []
    forward = model.forward

    def watched(**kwargs):
        output = forward(**kwargs)
        recorded.append(output.logits.requires_grad)
        return output

    monkeypatch.setattr(model, "forward", watched)
    score(model, tokens, perturb=perturb, draws=4)

    assert recorded and not any(recorded)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(*tiny.crossed(perturb=["weights", "units"], dtype=[torch.bfloat16, torch.float16]))
def test_half_precision_models_are_scored(dense, tokens, dtype, perturb):
    scores = score(dense.to(dtype), tokens, perturb=perturb, draws=4, epsilon=0.05)

    assert scores.details["epsilon"] == 0.05
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in scores.values.values())


def test_the_default_step_is_larger_where_numbers_are_coarse(tokens):
    for dtype, epsilon in ((torch.float32, 1e-3), (torch.bfloat16, 1e-2)):
        model = tiny.make_model("llama_gqa_biases", dtype=dtype)
        assert score(model, tokens, draws=2).details["epsilon"] == epsilon


@pytest.mark.parametrize("perturb", ["weights", "units"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_request_of_the_core_applies(tokens, perturb, scope):
    """Budgets, constraints, grouped-query attention and padding come from the core alone."""
    model = tiny.make_model("llama_gqa_biases")
    mask = torch.ones_like(tokens)
    mask[:4, :7] = 0
    pruner = FwdPruner(model)
    pruner.prune(
        tiny.request(
            method="mini_llm",
            perturb=perturb,
            scope=scope,
            sparsity=0.4,
            multiple_of=8,
            attention_unit="kv_group",
            skip_layers=[0],
            draws=4,
        ),
        {"input_ids": tokens, "attention_mask": mask},
    )
    kept = pruner.plan.kept

    assert len(kept[0, "mlp"]) == 64 and len(kept[0, "attention"]) == 3
    assert all(len(kept[layer, "mlp"]) % 8 == 0 for layer in range(3))
    assert sum(len(kept[layer, "mlp"]) for layer in (1, 2)) < 128


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draws": 0}, "draws must be at least 1; got 0"),
        ({"windows_per_draw": 0}, "windows_per_draw must be at least 1"),
        ({"stop_after": -1}, "stop_after must be at least 1"),
        ({"epsilon": 0.0}, r"epsilon must be in \(0, 1\]; got 0.0"),
        ({"epsilon": -1e-3}, r"epsilon must be in \(0, 1\]"),
        ({"gradient": "psychic"}, "gradient must be one of zeroth_order, exact, ones, random; got 'psychic'"),
        ({"perturb": "norms"}, "perturb must be one of weights, units"),
    ],
)
def test_options_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny.request(method="mini_llm", **fields)


def test_a_model_without_a_language_head_is_refused(tokens):
    import transformers

    model = tiny.make_model("llama_gqa_biases", transformers.AutoModelForSequenceClassification)
    for method in ("mini_llm", "taylor"):
        with pytest.raises(ValueError, match="does not predict the next token, and the loss needs"):
            FwdPruner(model).score(tiny.request(method=method), tokens)
