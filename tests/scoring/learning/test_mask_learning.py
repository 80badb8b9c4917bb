"""Policy-gradient pruning as a whole: what it learns, that it can be stopped, and what it refuses."""

import pytest
import tiny
import torch

from optimum_fwdprune import Calibration, FwdPruner, find_sites
from optimum_fwdprune.loading.subject import Subject
from optimum_fwdprune.scoring.learning import mask_learning as module
from optimum_fwdprune.scoring.learning.policies import UnitPolicy
from optimum_fwdprune.scoring.methods import PolicyGradientConfig
from optimum_fwdprune.scoring.scores import Scores


def config(**fields):
    return tiny.request(
        **{"method": "policy_gradient", "parametrization": "unit", "steps": 6, "sparsity": 0.4, "seed": 3, **fields}
    )


def learn(tokens, model=None, **fields):
    model = tiny.make_model("llama_gqa_biases") if model is None else model
    return FwdPruner(model).score(config(**fields), tokens)


@torch.no_grad()
def test_every_mask_is_judged_as_if_it_were_alone(dense, tokens):
    """Masks that share a batch get the losses that they would get one by one."""
    sites = find_sites(dense)
    schedule = module.Schedule(
        6, 0.1, "leave_one_out", 4, False, 3, 5.0, None, batch_size=7, seed=0, prunable_parameters=1
    )
    learner = module._Learner(Subject(dense, sites), Calibration(tokens), UnitPolicy(sites, []), schedule)
    masks = (torch.rand(4, sum(site.num_units for site in sites)) > 0.3).double()
    windows = torch.tensor([5, 0, 9])
    found = learner._losses(masks, windows)
    for mask, loss in zip(masks, found):
        gates = dict(zip((site.key for site in sites), mask.float().split([site.num_units for site in sites])))
        with module.gated(sites, gates):
            expected = dense(input_ids=tokens[windows], labels=tokens[windows]).loss
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)


def test_an_epoch_takes_every_window_once(tokens):
    schedule = module.Schedule(
        6, 0.1, "leave_one_out", 2, False, 3, 5.0, None, batch_size=7, seed=0, prunable_parameters=1
    )
    model = tiny.make_model("llama_gqa_biases")
    sites = find_sites(model)
    policy = UnitPolicy(sites, [])
    learner = module._Learner(Subject(model, sites), Calibration(tokens[:6]), policy, schedule)
    first = torch.cat([learner._windows(0), learner._windows(1)])
    second = torch.cat([learner._windows(2), learner._windows(3)])

    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(6))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize(
    *tiny.crossed(
        estimator=["leave_one_out", "moving_average"], budget=["separate", "joint"], scope=["layer", "global"]
    )
)
def test_probabilities_stay_within_their_budgets(dense, tokens, estimator, budget, scope):
    pruner = FwdPruner(dense)
    request = config(estimator=estimator, budget=budget, scope=scope, learning_rate=0.5, attention_unit="kv_group")
    sites = {site.key: site for site in find_sites(dense, "kv_group")}
    scores = pruner.score(request, tokens).values
    kept = FwdPruner(dense)
    kept.prune(request, tokens, scores=pruner.scores, inplace=False)

    assert all(float(value.min()) >= 0 and float(value.max()) <= 1 for value in scores.values())
    pools = {}
    for key, site in sites.items():
        pool = pools.setdefault((key[1] if budget == "separate" else "", key[0] if scope == "layer" else ""), [0.0, 0])
        pool[0] += float(scores[key].double().sum()) * site.unit_parameters
        pool[1] += len(kept.plan.kept[key]) * site.unit_parameters
    largest = max(site.unit_parameters for site in sites.values())
    for expected, allowed in pools.values():
        # Which whole units fill a budget best differs by at most one of them.
        assert expected <= allowed + largest
    assert any(0.01 < float(value.mean()) < 0.99 for value in scores.values())


@pytest.mark.parametrize("estimator", ["leave_one_out", "moving_average"])
def test_learning_finds_the_units_that_matter(tokens, monkeypatch, estimator):
    """Every second unit lowers the loss; from equal chances, and under the noise of the batches, these must win."""
    generator = torch.Generator().manual_seed(0)

    def losses(self, masks, windows):
        return 5 - 20 * masks[:, 1::2].mean(1) + torch.rand((), generator=generator)

    monkeypatch.setattr(module._Learner, "_losses", losses)
    options = {"initialization": "constant", "sparsity": 0.5, "steps": 300, "learning_rate": 0.1}
    scores = learn(tokens, tiny.make_model("llama_mha_tied"), estimator=estimator, **options)
    learned = torch.cat([scores.values[key] for key in sorted(scores.values)])

    assert learned[1::2].mean() > 0.8 > 0.2 > learned[::2].mean()
    assert scores.history["entropy"][-1] < 0.7 < 0.9 < scores.history["entropy"][0]
    assert scores.history["loss"][-20:].mean() < scores.history["loss"][:20].mean() - 5


@pytest.mark.parametrize("estimator", ["leave_one_out", "moving_average"])
def test_ratios_go_where_they_lower_the_loss(tokens, monkeypatch, estimator):
    """Only the last layer matters: it must end up with most of what is kept, its best units by the metric."""
    model = tiny.make_model("llama_mha_tied")
    sites = find_sites(model)
    starts = torch.tensor([site.num_units for site in sites]).cumsum(0) - sites[0].num_units
    generator = torch.Generator().manual_seed(0)

    def losses(self, masks, windows):
        return 5 - masks[:, int(starts[-2]) :].mean(1) + 0.1 * torch.rand((), generator=generator)

    monkeypatch.setattr(module._Learner, "_losses", losses)
    pruner = FwdPruner(model)
    request = config(
        parametrization="ratio", estimator=estimator, sparsity=0.5, steps=100, learning_rate=0.3, metric="magnitude"
    )
    pruner.prune(request, tokens, inplace=False)
    widths = [len(pruner.plan.kept[2, "mlp"]), len(pruner.plan.kept[0, "mlp"])]
    magnitude = FwdPruner(model).score(tiny.request(method="magnitude"), tokens).values[2, "mlp"]

    assert widths[0] > 56 and widths[1] < 24
    assert pruner.plan.kept[2, "mlp"] == magnitude.topk(widths[0]).indices.sort().values.tolist()
    rates = pruner.scores.history["keep_rate.2.mlp"]
    assert rates[-1] > 0.9 > 0.7 > rates[0]
    assert float(rates[-1]) == pytest.approx(widths[0] / 64, abs=0.02)


def test_no_steps_return_the_initialization(tokens):
    start = learn(tokens, steps=0, scope="layer", initialization="sigmoid")
    metric = FwdPruner(tiny.make_model("llama_gqa_biases")).score(tiny.request(method="wanda_sp"), tokens).values
    for key, values in start.values.items():
        assert (values[metric[key].argsort()].diff() >= 0).all()
    assert start.details == {"steps": 0, "skipped_steps": 0, "rejected_masks": 0}


@pytest.mark.parametrize("metric", ["flap", "magnitude", "random"])
def test_any_metric_can_start_it(tokens, metric):
    start = learn(tokens, steps=0, metric=metric)
    expected = FwdPruner(tiny.make_model("llama_gqa_biases")).score(tiny.request(method=metric, seed=3), tokens).values
    for key, values in start.values.items():
        assert (values[expected[key].argsort()].diff() >= 0).all()


def test_batches_of_any_size_learn_the_same(tokens):
    one, many = (learn(tokens, batch_size=size).values for size in (1, 8))
    for key in one:
        torch.testing.assert_close(one[key], many[key], rtol=1e-3, atol=1e-4)


def test_padding_changes_nothing(tokens):
    """Windows of unequal length: with padding of any content, and on either side of nothing but itself."""
    mask = torch.ones_like(tokens)
    mask[::2, -7:] = 0
    results = []
    for filler in (0, 17):
        padded = {"input_ids": tokens.where(mask.bool(), torch.tensor(filler)), "attention_mask": mask}
        results.append(learn(padded))
    whole = learn(tokens)

    assert not torch.equal(whole.history["loss"], results[0].history["loss"])
    torch.testing.assert_close(results[0].history["loss"], results[1].history["loss"])
    for key, values in results[0].values.items():
        torch.testing.assert_close(values, results[1].values[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parametrization", ["unit", "ratio"])
def test_bfloat16_models_learn_from_nearly_the_same_losses(tokens, parametrization):
    # The same masks: neither probabilities nor ranks come from rounded activations.
    options = {"parametrization": parametrization, "steps": 1, "initialization": "constant", "metric": "random"}
    exact, rounded = (
        learn(tokens, tiny.make_model("llama_gqa_biases", dtype=dtype), **options)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert float(rounded.history["loss"][0]) == pytest.approx(float(exact.history["loss"][0]), rel=1e-2)
    assert all(values.isfinite().all() for values in rounded.values.values())


def test_a_model_on_a_device_map_learns_the_same(tokens):
    """Dispatched by accelerate; there is one device here, so what is tested is its hooks."""
    from accelerate import dispatch_model

    model = tiny.make_model("llama_gqa_biases")
    alone = learn(tokens, model)
    dispatched = dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    found = learn(tokens, dispatched)

    for key, values in alone.values.items():
        torch.testing.assert_close(found.values[key], values)


@pytest.mark.parametrize("parametrization", ["unit", "ratio"])
@pytest.mark.parametrize("stopped_after", [1, 5])
def test_a_killed_run_goes_on_to_the_same_result_bit_for_bit(
    tokens, tmp_path, monkeypatch, stopped_after, parametrization
):
    options = {"antithetic": True, "parametrization": parametrization}
    whole = learn(tokens, **options)
    folder = tmp_path / "run"
    step = module._Learner.step

    def killed(self, state, number):
        if number == stopped_after:
            raise KeyboardInterrupt
        return step(self, state, number)

    monkeypatch.setattr(module._Learner, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        learn(tokens, resume=str(folder), resume_seconds=0.0, **options)
    done = []
    monkeypatch.setattr(
        module._Learner, "step", lambda self, state, number: done.append(number) or step(self, state, number)
    )
    resumed = learn(tokens, resume=str(folder), **options)

    assert done == list(range(stopped_after, 6))
    assert all(torch.equal(resumed.values[key], whole.values[key]) for key in whole.values)
    assert all(torch.equal(resumed.history[name], whole.history[name]) for name in whole.history)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"learning_rate": 0.5}, "its learning_rate is None, this one's is 0.5"),
        ({"sparsity": 0.3}, "its sparsity is 0.4"),
        ({"seed": 4}, "its seed is 3"),
    ],
)
def test_a_state_of_another_run_is_refused_with_the_difference(tokens, tmp_path, change, difference):
    file = str(tmp_path / "state")
    learn(tokens, resume=file)
    with pytest.raises(ValueError, match=f"belongs to another run: {difference}"):
        learn(tokens, resume=file, **change)


def test_a_state_of_another_model_or_text_is_refused(tokens, tmp_path):
    file = str(tmp_path / "state")
    learn(tokens, resume=file)
    with pytest.raises(ValueError, match="another run: its weights is"):
        learn(tokens, tiny.make_model("llama_gqa_biases", seed=1), resume=file)
    changed = tiny.make_model("llama_gqa_biases")
    changed.model.layers[1].self_attn.q_proj.weight.data.mul_(2)
    with pytest.raises(ValueError, match="another run: its weights is"):
        learn(tokens, changed, resume=file)
    with pytest.raises(ValueError, match="another run: its weights is"):
        learn(tokens, tiny.make_model("llama_gqa_biases").bfloat16(), resume=file)
    with pytest.raises(ValueError, match="another run: its tokens is"):
        learn(tokens.flip(0), resume=file)
    padded = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens).index_fill(1, torch.tensor([0]), 0)}
    with pytest.raises(ValueError, match="another run: its tokens is"):
        learn(padded, resume=file)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"half"])
def test_a_damaged_state_is_named(tokens, tmp_path, content):
    file = tmp_path / "policy_gradient.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not the state of a run"):
        learn(tokens, resume=str(tmp_path))
    assert file.read_bytes() == content


def test_a_state_that_cannot_be_written_fails_before_anything_is_measured(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(module._Learner, "step", lambda *_: pytest.fail("it measured"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OSError, match=r"Cannot write beside .*state"):
            learn(tokens, resume=str(path))


def with_losses(monkeypatch, change):
    losses = module._Learner._losses
    monkeypatch.setattr(module._Learner, "_losses", lambda self, *arguments: change(losses(self, *arguments)))


def test_masks_without_a_finite_loss_do_not_count(tokens, monkeypatch):
    with_losses(monkeypatch, lambda losses: losses.index_fill(0, torch.tensor([0]), torch.nan))
    scores = learn(tokens)

    assert (scores.details["skipped_steps"], scores.details["rejected_masks"]) == (0, 6)
    assert all(value.isfinite().all() for value in scores.values.values())


def test_steps_without_a_finite_loss_are_skipped_and_counted(tokens, monkeypatch):
    calls = []

    def change(losses):
        calls.append(1)
        return losses * (torch.inf if len(calls) % 2 else 1)

    with_losses(monkeypatch, change)
    scores = learn(tokens)

    assert scores.details["skipped_steps"] == 3
    assert scores.history["loss"].isnan().tolist() == [True, False] * 3
    assert all(value.isfinite().all() for value in scores.values.values())


def test_a_run_without_finite_losses_is_an_error(tokens, monkeypatch):
    with_losses(monkeypatch, lambda losses: losses * torch.nan)
    with pytest.raises(ValueError, match="10 steps in a row had no finite loss"):
        learn(tokens, steps=50)


def test_it_stops_once_the_loss_is_flat(tokens, monkeypatch):
    """Three stretches of four steps that are no better than the first."""
    with_losses(monkeypatch, lambda losses: losses * 0 + 2 + 0.001 * torch.arange(len(losses)))
    scores = learn(tokens, steps=50, stop_when_flat=4)

    assert scores.details["steps"] == 16
    assert len(scores.history["loss"]) == 16


def test_a_loss_that_falls_under_noise_is_not_flat(tokens, monkeypatch):
    calls = []
    generator = torch.Generator().manual_seed(0)

    def change(losses):
        calls.append(1)
        return losses * 0 + 4 - len(calls) / 40 + 0.3 * torch.randn(len(losses), generator=generator).double()

    with_losses(monkeypatch, change)
    assert learn(tokens, steps=60, stop_when_flat=5).details["steps"] == 60


@pytest.mark.parametrize("fields", [{"kinds": ["mlp"]}, {"skip_layers": [0]}])
@pytest.mark.parametrize("parametrization", ["unit", "ratio"])
def test_the_expected_sparsity_is_a_fraction_of_all_that_is_prunable(tokens, fields, parametrization):
    scores = learn(tokens, sparsity=0.2, parametrization=parametrization, learning_rate=0.3, **fields)

    assert scores.history["expected_sparsity"].tolist() == pytest.approx([0.2] * 6, abs=0.01)


def test_ratios_keep_what_the_request_keeps_at_least(tokens):
    """And together all of the budget, whatever was clipped on the way."""
    scores = learn(
        tokens,
        parametrization="ratio",
        learning_rate=20.0,
        kinds=["mlp"],
        sparsity=0.3,
        min_units_per_site=20,
        steps=12,
    )
    rates = torch.stack([values for name, values in scores.history.items() if name.endswith("mlp")])

    assert float(rates.min()) == pytest.approx(20 / 64) and float(rates.max()) == 1
    assert scores.history["expected_sparsity"].tolist() == pytest.approx([0.3] * 12, abs=0.01)


def test_a_lone_ratio_has_nothing_to_learn(tokens):
    with pytest.raises(ValueError, match="every site has a budget of its own here; use budget='joint'"):
        learn(tokens, parametrization="ratio", skip_layers=[0, 1], sparsity=0.1)


def test_ratios_start_where_the_metric_ranks(tokens):
    model = tiny.make_model("llama_gqa_biases")
    pruner = FwdPruner(model)
    pruner.prune(config(parametrization="ratio", steps=0, metric="magnitude"), tokens, inplace=False)
    magnitude = FwdPruner(model).score(tiny.request(method="magnitude"), tokens).values
    for layer in range(3):
        kept = pruner.plan.kept[layer, "mlp"]
        assert kept == magnitude[layer, "mlp"].topk(len(kept)).indices.sort().values.tolist()
    widths = [len(pruner.plan.kept[layer, "mlp"]) for layer in range(3)]
    assert max(widths) - min(widths) <= 1


def test_a_run_that_stopped_flat_stays_where_it_is(tokens, monkeypatch, tmp_path):
    with_losses(monkeypatch, lambda losses: losses * 0 + 2 + 0.001 * torch.arange(len(losses)))
    file = str(tmp_path / "state")
    first, second = (learn(tokens, steps=50, stop_when_flat=4, resume=file) for _ in range(2))

    assert first.details == second.details
    assert all(torch.equal(first.values[key], second.values[key]) for key in first.values)
    assert all(torch.equal(first.history[name], second.history[name]) for name in first.history)


def test_the_metric_is_measured_on_the_windows_asked_for(tokens):
    few = learn(tokens, steps=0, metric_samples=4)
    alone = learn(tokens[:4], steps=0)

    assert all(torch.equal(few.values[key], alone.values[key]) for key in alone.values)
    others = learn(tokens[4:8], steps=0)
    assert any(not torch.equal(others.values[key], alone.values[key]) for key in alone.values)


def test_history_is_kept_with_the_scores(tokens, tmp_path):
    scores = learn(tokens)
    scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(tmp_path / "scores.safetensors")

    assert {name: tuple(values.shape) for name, values in loaded.history.items()} == {
        "loss": (6,),
        "entropy": (6,),
        "expected_sparsity": (6,),
        **{f"keep_rate.{layer}.{kind}": (6,) for layer in range(3) for kind in ("attention", "mlp")},
    }
    assert all(torch.equal(loaded.history[name], values) for name, values in scores.history.items())
    assert float(scores.history["expected_sparsity"][-1]) == pytest.approx(0.4, abs=0.05)


def test_what_the_request_leaves_alone_is_kept(tokens):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases"))
    pruner.prune(config(kinds=["mlp"], skip_layers=[-1], sparsity=0.2), tokens)

    assert len(pruner.plan.kept[2, "mlp"]) == 64 and len(pruner.plan.kept[0, "attention"]) == 6
    assert sum(len(pruner.plan.kept[layer, "mlp"]) for layer in (0, 1)) < 128


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"masks_per_step": 1}, "masks_per_step must be at least 2; got 1. A mask's baseline is the loss of another"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"antithetic": True, "masks_per_step": 2}, "masks_per_step must be 4, 6, ...; got 2"),
        ({"antithetic": True, "masks_per_step": 5}, "got 5"),
        ({"antithetic": True, "estimator": "moving_average"}, "use estimator='leave_one_out'"),
        ({"metric": "policy_gradient"}, "metric must be one of"),
        ({"metric": "astrology"}, "metric must be one of .*; got 'astrology'"),
        ({"baseline_horizon": 0.5}, "baseline_horizon must be at least 1"),
        ({"parametrization": "ratio", "scope": "layer"}, "leaves every site on its own; use scope='global' or"),
        ({"parametrization": "ratio", "ratio_spread": 0.0}, "ratio_spread must be positive; got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_the_papers_preset_runs(tokens):
    preset = PolicyGradientConfig.paper(steps=3, sparsity=0.4)
    scores = FwdPruner(tiny.make_model("llama_gqa_biases")).score(preset, tokens)

    assert (preset.estimator, preset.masks_per_step, preset.windows_per_step) == ("moving_average", 2, 8)
    assert (preset.learning_rate, preset.seq_len, preset.seed) == (2e-3, 128, 42)
    assert scores.details["steps"] == 3
