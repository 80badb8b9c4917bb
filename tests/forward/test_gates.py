"""Gates: one mask for all, one mask per sequence, and nothing left behind."""

import pytest
import tiny
import torch

from optimum_fwdprune import Calibration, FwdPruner, PruningPlan, find_sites
from optimum_fwdprune.cutting.probe import Probe
from optimum_fwdprune.cutting.verification import relative_difference
from optimum_fwdprune.forward.gates import gated
from optimum_fwdprune.loading.subject import Subject
from optimum_fwdprune.runs.shelves import Shelf


def random_masks(sites, rows=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = () if rows is None else (rows,)
    return {site.key: (torch.rand(*shape, site.num_units, generator=generator) > 0.4).float() for site in sites}


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@torch.no_grad()
def test_every_sequence_computes_under_its_own_mask(dense, tokens, unit):
    sites = find_sites(dense, unit)
    masks = random_masks(sites, rows=4)
    with gated(sites, masks):
        together = dense(tokens[:4]).logits
    for row in range(4):
        with gated(sites, {key: mask[row] for key, mask in masks.items()}):
            alone = dense(tokens[row : row + 1]).logits

        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
    assert not torch.allclose(together, dense(tokens[:4]).logits, rtol=1e-2)


@torch.no_grad()
def test_open_gates_change_nothing_and_leave_nothing(dense, tokens):
    sites = find_sites(dense)
    expected = dense(tokens).logits
    with gated(sites, {site.key: torch.ones(site.num_units) for site in sites}):
        assert torch.equal(dense(tokens).logits, expected)
    with gated(sites, {site.key: torch.zeros(site.num_units) for site in sites}):
        assert not torch.equal(dense(tokens).logits, expected)

    assert torch.equal(dense(tokens).logits, expected)


@pytest.mark.parametrize("method", tiny.methods_of_dense_models())
def test_scoring_leaves_every_dense_weight_bit_identical(dense, tokens, method):
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    FwdPruner(dense.train()).score(tiny.request(method=method, **tiny.SHORT.get(method, {})), tokens)

    assert dense.training
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in dense.modules())


@pytest.mark.parametrize(
    "options",
    [
        {"reconstruction": "none"},
        {"reconstruction": "bias"},
        {"reconstruction": "least_squares"},
        {"reconstruction": "least_squares", "reconstruction_order": "sequential", "reconstruction_target": "layer"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_pruning_not_in_place_leaves_every_dense_weight_bit_identical(dense, tokens, options):
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    config = tiny.request(sparsity=0.4, **options)
    FwdPruner(dense).prune(config, tokens, inplace=False)

    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@torch.no_grad()
def test_gates_that_16_bits_cannot_hold_are_not_rounded(tokens):
    """1.003 is 1 in bfloat16; the product with it is not always what the activation was."""
    model = tiny.make_model("llama_gqa_biases", dtype=torch.bfloat16)
    site = find_sites(model)[1]
    seen = []
    with gated([site], {site.key: torch.full((site.num_units,), 1.003)}):
        handle = site.projection.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        model(input_ids=tokens)
        handle.remove()
    handle = site.projection.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(input_ids=tokens)
    handle.remove()

    assert torch.equal(seen[0], (seen[1].float() * 1.003).bfloat16())
    assert not torch.equal(seen[0], seen[1])


def test_masks_that_do_not_fit_are_refused(tokens):
    model = tiny.make_model("llama_gqa_biases")
    sites = find_sites(model)
    for shape in ((5,), (2, 2, 64)):
        with (
            pytest.raises(ValueError, match=r"must be \[64\] or \[batch_size, 64\]"),
            gated(sites, {(0, "mlp"): torch.ones(shape)}),
        ):
            pass
    with (
        pytest.raises(ValueError, match="3 masks do not fit a batch of 4"),
        gated(sites, {(0, "mlp"): torch.ones(3, 64)}),
    ):
        model(tokens[:4])

    assert not any(site.projection._forward_pre_hooks for site in sites)


def test_a_gate_that_has_no_effect_is_an_error(tokens, monkeypatch):
    model = tiny.make_model("llama_gqa_biases")
    sites = find_sites(model)
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda hidden: hidden)
    with (
        pytest.raises(RuntimeError, match=r"bypassed the module with the gates of site 1\.mlp"),
        gated(sites, random_masks(sites)),
    ):
        model(tokens)


def test_blooms_slow_but_exact_path_is_refused_before_anything_changes(tokens):
    """With tensor parallel pretraining it slices the projection's weight and never calls the projection."""
    model = tiny.make_model("bloom", pretraining_tp=2, slow_but_exact=True)
    before = model(tokens).logits
    with pytest.raises(ValueError, match="never called"):
        FwdPruner(model).prune(None, tokens)

    assert torch.equal(model(tokens).logits, before)


def test_rounding_that_the_model_amplifies_is_no_disagreement(tokens):
    """Attention that looks for very sharp differences makes much of little."""
    expected, actual = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001])
    with pytest.raises(RuntimeError, match=r"differ by 0\.0005 of their scale, more than the 0\.0001"):
        relative_difference(expected, actual)
    assert relative_difference(expected, actual, rounding=1e-4) == pytest.approx(5e-4, rel=1e-3)
    with pytest.raises(RuntimeError, match=r"more than the 0\.01 that"):
        relative_difference(expected, torch.tensor([1.0, 2.1]), rounding=1.0)
    # In 16 bit it may be that and no error, and float32 tells.
    with pytest.raises(RuntimeError, match=r"Prune the model in float32\. .* If it fails, the architecture's layout"):
        relative_difference(expected.bfloat16(), torch.tensor([1.0, 2.5], dtype=torch.bfloat16))
    # A model that makes 0.4 of one rounding error explains a quarter; one that makes 0.1 of it does not.
    coarse = expected.bfloat16(), torch.tensor([1.0, 2.5], dtype=torch.bfloat16)
    assert relative_difference(*coarse, rounding=0.4) == 0.25
    with pytest.raises(RuntimeError, match=r"more than the 0\.1 that"):
        relative_difference(*coarse, rounding=0.1)
    with pytest.raises(RuntimeError, match=r"more than the 0\.5 that"):
        relative_difference(coarse[0], torch.tensor([1.0, 4.0], dtype=torch.bfloat16), rounding=3.0)

    def rounding(scale):
        model = tiny.make_model("llama_gqa_biases")
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data *= scale
        sites = find_sites(model)
        plan = PruningPlan(
            {site.key: list(range(site.num_units)) for site in sites},
            {site.key: site.num_units for site in sites},
            "llama",
            "query_head",
            {},
        )
        probe = Probe(Subject(model, sites), plan, Calibration(tokens), Shelf())
        for number in range(len(model.model.layers)):
            probe.pass_layer(number, {})
        masked, amplified = probe.expected()
        torch.testing.assert_close(masked, model(tokens[:2]).logits)
        return amplified

    assert 1e-8 < rounding(1.0) < 1e-5
    assert rounding(3000.0) > 5 * rounding(1.0)


def test_a_pruned_model_that_disagrees_with_the_masked_one_is_an_error(tokens, monkeypatch):
    from optimum_fwdprune.cutting import in_memory as module

    surgery = module.prune_model

    def damaged(*args, **kwargs):
        pruned = surgery(*args, **kwargs)
        pruned.model.layers[1].mlp.down_proj.weight.data.mul_(1.01)
        return pruned

    monkeypatch.setattr(module, "prune_model", damaged)
    with pytest.raises(RuntimeError, match="differs from the masked dense model: logits differ"):
        FwdPruner(tiny.make_model("llama_gqa_biases")).prune(None, tokens)
