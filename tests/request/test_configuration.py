"""The request: defaults, dispatch, files, and values that make no sense."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import tiny

from optimum_fwdprune import PruningConfig, register_method
from optimum_fwdprune.request.budget_options import COUNTS
from optimum_fwdprune.request.choices import ReconstructionKind, Scope, UnitKind
from optimum_fwdprune.request.files import CONFIG_NAME
from optimum_fwdprune.request.registry import (
    get_method,
    get_preset,
    registered_methods,
    registered_presets,
)
from optimum_fwdprune.scoring.methods import FlapConfig, RandomConfig, TaylorConfig


@pytest.mark.parametrize("name", registered_methods())
def test_the_method_picks_the_subclass_and_survives_the_disk(name, tmp_path):
    kinds = tiny.kinds_scored_by(name)[-1:]
    skipped = [] if kinds == ["expert"] else [0, -1]
    config = PruningConfig(method=name, sparsity=0.3, skip_layers=skipped, kinds=kinds, seed=7)
    config.save_pretrained(tmp_path)

    assert type(config) is get_method(name).config_class
    assert PruningConfig.from_pretrained(tmp_path) == config
    assert type(PruningConfig.from_pretrained(tmp_path)) is type(config)


def test_defaults():
    config = PruningConfig()

    assert (config.method, config.sparsity, config.reconstruction) == ("wanda_sp", 0.2, "least_squares")
    assert (config.resolved_scope, config.resolved_kinds) == ("layer", ["mlp"])
    assert config == PruningConfig.from_preset("balanced") == PruningConfig.of() and not get_preset("balanced").fields


@pytest.mark.parametrize("name", registered_methods())
def test_a_method_sets_no_field_but_its_own(name):
    shared = [field.name for field in dataclasses.fields(PruningConfig) if field.name != "method"]
    config, plain = PruningConfig(name), PruningConfig()

    assert {field: getattr(config, field) for field in shared} == {field: getattr(plain, field) for field in shared}
    learns_or_layers = name in ("policy_gradient", "block_influence", "removal_loss")
    assert config.resolved_scope == ("global" if learns_or_layers else "layer")


@pytest.mark.parametrize(
    "fields",
    [
        {"multiple_of": 8},
        {"tensor_parallel": 2},
        {"ridge": 0.1},
        {"rounds": 2},
        {"skip_layers": [1]},
        {"layout": "stock"},
        {"scope": "global"},
        {"attention_unit": "kv_group"},
        {"reconstruction": "none"},
        {"method": "magnitude"},
        {"method": "flap"},
        {"n_samples": 4},
    ],
    ids=str,
)
def test_an_option_changes_that_option_and_nothing_else(fields):
    plain, changed = PruningConfig(sparsity=0.3).to_dict(), PruningConfig(sparsity=0.3, **fields).to_dict()

    assert changed == plain | fields


def test_attention_is_pruned_where_it_has_a_budget_of_its_own():
    assert PruningConfig(attention_sparsity=0.1).resolved_kinds == ["attention", "mlp"]
    assert PruningConfig(mlp_sparsity=0.1).resolved_kinds == ["mlp"]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("sparsity", 7, ValueError, r"sparsity must be in \[0, 1\); got 7"),
        ("kinds", ["heads"], ValueError, "kinds must be one of attention, mlp, expert, layer, sublayer; got 'heads'"),
        ("n_samples", "8", ValueError, "n_samples must be an int or 'auto'; got '8'"),
        ("reconstruction_target", "layer", ValueError, "reconstruction_order is 'independent' here"),
        ("method", "flap", ValueError, "for 'flap' use PruningConfig"),
        ("sparsty", 0.3, AttributeError, "has no option 'sparsty'. Did you mean sparsity?"),
        ("draws", 4, AttributeError, "has no option 'draws'. That is an option of method='mini_llm'."),
    ],
)
def test_assignments_are_checked_and_leave_the_config_as_it_was(name, value, error, message):
    config = PruningConfig(reconstruction_order="independent")
    before = config.to_dict()

    with pytest.raises(error, match=message):
        setattr(config, name, value)
    assert config.to_dict() == before
    config.sparsity = np.float32(0.5)
    assert config.sparsity == 0.5 and type(config.sparsity) is float


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (0.3, TypeError, r"got a float. Options are named: sparsity=0.3"),
        ([[1, 2]], TypeError, "got a list. Calibration text and tokens are passed as dataset="),
        ("flap", ValueError, "'flap' is a method and not a preset; pass method='flap'"),
        (["best"], TypeError, "got a list"),
        ("bset", ValueError, "preset must be one of .*; got 'bset'. Did you mean best?"),
    ],
)
def test_what_is_no_request_is_refused_with_the_way_out(asked, error, message):
    with pytest.raises(error, match=message):
        PruningConfig.of(asked)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: PruningConfig("best"),
            ValueError,
            r"'best' is a preset .*; write PruningConfig.from_preset\('best'\)",
        ),
        (lambda: PruningConfig(0.3), TypeError, "got 0.3. Options are named: sparsity=0.3"),
        (lambda: PruningConfig(["flap"]), ValueError, r"method must be one of .*; got \['flap'\]"),
        (lambda: PruningConfig.from_preset("flap"), ValueError, "'flap' is a method and not a preset"),
        (lambda: PruningConfig.from_preset({}), ValueError, "preset must be one of"),
        (
            lambda: PruningConfig.of(draws=4),
            TypeError,
            "has no option 'draws'. That is an option of method='mini_llm'",
        ),
        (
            lambda: PruningConfig.of(PruningConfig(), method="flap"),
            ValueError,
            "Leave out method, or pass the options",
        ),
        (lambda: PruningConfig.from_dict([1]), ValueError, "made from a dictionary of its options; got a list"),
        (lambda: PruningConfig.from_dict({"method": [1]}), ValueError, "method must be one of"),
    ],
)
def test_what_makes_no_config_is_refused_with_the_way_out(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_request_is_a_preset_or_a_config_with_fields_changed():
    config = PruningConfig("flap", sparsity=0.3)

    assert PruningConfig.of("best", sparsity=0.4) == PruningConfig(refit_sources=True, sparsity=0.4)
    assert PruningConfig.of(config, sparsity=0.4) == PruningConfig("flap", sparsity=0.4) and config.sparsity == 0.3
    assert PruningConfig.of(config) == config and PruningConfig.of(config) is not config
    # What entered a list without an assignment is checked as well.
    config.kinds = ["mlp"]
    config.kinds.append("heads")
    with pytest.raises(ValueError, match="got 'heads'"):
        PruningConfig.of(config)
    with pytest.raises(TypeError, match=r"has no option 'sparsty'\. Did you mean sparsity\?"):
        PruningConfig.of(sparsty=0.3)


@pytest.mark.parametrize(
    ("method", "reconstruction"), [("wanda_sp", "least_squares"), ("flap", "bias"), ("random", "none")]
)
def test_files_in_which_methods_had_reconstructions_of_their_own_mean_the_same(method, reconstruction, tmp_path):
    values = PruningConfig(method, kinds=["attention", "mlp"]).to_dict() | {"reconstruction": None}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))

    config = PruningConfig.from_pretrained(tmp_path)
    assert (config.reconstruction, config.kinds) == (reconstruction, ["attention", "mlp"])


def test_every_field_has_a_help_text():
    for declared in dataclasses.fields(PruningConfig):
        assert declared.metadata["help"].endswith("."), declared.name


def test_lists_of_presets_are_not_shared_between_configs():
    PruningConfig.from_preset("flap-paper").kinds.append("mlp")

    assert PruningConfig.from_preset("flap-paper").kinds == ["attention", "mlp"]


def test_numbers_of_other_libraries_and_tuples_become_plain_values(tmp_path):
    config = PruningConfig(sparsity=np.float32(0.5), n_samples=np.int64(3), kinds=("mlp",))
    config.save_pretrained(tmp_path)

    assert PruningConfig.from_pretrained(tmp_path) == config
    assert (type(config.n_samples), config.kinds) == (int, ["mlp"])


def test_unknown_keys_warn_with_the_version_that_wrote_them(tmp_path, caplog):
    values = {**PruningConfig().to_dict(), "from_the_future": 1, "fwdprune_version": "9.9"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        config = PruningConfig.from_pretrained(tmp_path)

    assert config == PruningConfig()
    assert "from_the_future" in caplog.text and "9.9" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\); got 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\); got -0.1"),
        ({"sparsity": float("nan")}, r"sparsity must be a finite number; got nan"),
        ({"mlp_sparsity": 20}, r"mlp_sparsity must be in \[0, 1\); got 20"),
        ({"attention_sparsity": 2}, r"attention_sparsity must be in \[0, 1\); got 2"),
        ({"n_samples": 0}, "n_samples must be at least 1; got 0"),
        ({"search_windows": 0}, "search_windows must be at least 1; got 0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"multiple_of": 0}, "multiple_of must be at least 1; got 0"),
        ({"multiple_of": "64"}, "multiple_of must be an int or 'auto'; got '64'"),
        ({"tensor_parallel": "auto"}, "tensor_parallel must be an int; got 'auto'"),
        ({"min_units_per_site": 0}, "min_units_per_site must be at least 1; got 0"),
        ({"target_parameters": -5}, "target_parameters must be at least 1; got -5"),
        ({"target_parameters": 5, "target_bytes": 5}, "set one of them"),
        ({"target_parameters": 5, "mlp_sparsity": 0.1}, "two budgets; set one of them"),
        ({"target_parameters": 5, "sparsity": 0.3}, "sparsity and target_parameters are two budgets"),
        ({"target_parameters": 5, "sparsity": 0.2}, "sparsity and target_parameters are two budgets"),
        ({"max_divergence": 0.1, "sparsity": 0.3}, "sparsity and max_divergence are two budgets"),
        ({"context_tokens": "32X"}, "context_tokens must be an int, such as 500K, 1M or 250000; got '32X'"),
        ({"target_parameters": "many"}, "target_parameters must be an int, such as 500K, .*; got 'many'"),
        ({"kinds": "mlp"}, r"kinds must be a list of str, such as \['attention', 'mlp'\]; got 'mlp'"),
        ({"kinds": []}, "must name at least one of attention, mlp, expert, layer"),
        ({"kinds": ["heads"]}, "kinds must be one of attention, mlp, expert, layer, sublayer; got 'heads'"),
        ({"kinds": ["mlp"], "attention_sparsity": 0.1}, r"attention_sparsity .* kinds=\['mlp'\] excludes"),
        ({"scope": "local"}, "scope must be one of layer, global, search; got 'local'"),
        ({"reconstruction": "magic"}, "reconstruction must be one of none, bias, least_squares; got 'magic'"),
        ({"method": "psychic"}, "method must be one of block_influence, .*; got 'psychic'"),
        ({"sparsity": "0.2"}, "sparsity must be a float; got '0.2'"),
        ({"n_samples": 2.5}, "n_samples must be an int or 'auto'; got 2.5"),
        ({"skip_layers": [0.5]}, r"skip_layers must be a list of int; got \[0.5\]"),
        ({"seed": None}, "seed must be an int; got None"),
        (
            {"reconstruction_order": "independent", "reconstruction_target": "dense"},
            "reconstruction_target='dense' is for least squares layer by layer, and reconstruction_order is",
        ),
    ],
)
def test_bad_values_are_named_with_the_way_out(values, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**values)


def test_a_subclass_refuses_another_method():
    with pytest.raises(ValueError, match=r"RandomConfig is the config of 'random'; for 'flap' use PruningConfig"):
        RandomConfig(method="flap")
    with pytest.raises(ValueError, match="config of 'flap'"):
        FlapConfig.from_dict(RandomConfig().to_dict())


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object"), ('{"method": 3}', "got 3")]
)
def test_damaged_files_are_named(text, message, tmp_path):
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError, match=message):
        PruningConfig.from_pretrained(tmp_path)


def test_a_folder_without_a_config_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        PruningConfig.from_pretrained(tmp_path)


def test_a_method_must_bring_its_own_config_class():
    with pytest.raises(ValueError, match="extends PruningConfig"):
        register_method(PruningConfig, lambda inputs: {})
    with pytest.raises(ValueError, match="extends PruningConfig"):
        register_method(dict, lambda inputs: {})


@pytest.mark.parametrize("name", registered_presets())
def test_presets_are_requests_that_fields_change(name):
    preset = PruningConfig.from_preset(name, sparsity=0.37)

    assert preset.to_dict() == PruningConfig(**get_preset(name).fields, sparsity=0.37).to_dict()
    assert get_preset(name).help.endswith(".")


@pytest.mark.parametrize("name", ["fast", "balanced", "best"])
def test_presets_by_cost_go_with_every_method(name):
    assert PruningConfig.from_preset(name).method == PruningConfig().method
    assert PruningConfig.from_preset(name, method="taylor") == TaylorConfig.from_preset(name)
    # Heads cost more than their parameters (docs/benchmarks/quality.md).
    assert PruningConfig.from_preset(name).resolved_kinds == ["mlp"]


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"preset must be one of .*policy-gradient-paper.*; got 'astrology'"):
        PruningConfig.from_preset("astrology")


def test_a_preset_of_another_method_is_refused():
    with pytest.raises(ValueError, match="is for method 'policy_gradient', not for 'flap'"):
        FlapConfig.from_preset("policy-gradient-paper")
    with pytest.raises(ValueError, match="is for method 'policy_gradient', not for 'flap'"):
        PruningConfig.from_preset("policy-gradient-paper", method="flap")


def test_values_of_options_may_be_enums_and_are_kept_as_plain_strings():
    enums = {"scope": Scope.GLOBAL, "kinds": [UnitKind.MLP], "reconstruction": ReconstructionKind.BIAS}
    config = PruningConfig(**enums)

    assert config == PruningConfig(scope="global", kinds=["mlp"], reconstruction="bias")
    assert {type(config.scope), type(config.kinds[0]), type(config.reconstruction)} == {str}
    assert json.loads(json.dumps(enums)) == {name: getattr(config, name) for name in enums}
    assert f"{Scope.GLOBAL} {Scope.GLOBAL!r}" == "global 'global'"


@pytest.mark.parametrize(
    ("text", "number"), [("5B", 5 * 10**9), ("1.5m", 1_500_000), ("32K", 32_000), ("250,000", 250_000), (77, 77)]
)
@pytest.mark.parametrize("name", COUNTS)
def test_large_numbers_may_have_a_unit(name, text, number):
    assert getattr(PruningConfig(**{name: text}), name) == number


@pytest.mark.parametrize("request_", [PruningConfig(target_parameters=5), PruningConfig(sparsity=0.3)], ids=str)
def test_a_target_replaces_an_earlier_sparsity_but_not_the_other_way_round(request_):
    assert PruningConfig.of("flap-paper", target_parameters=7).target_parameters == 7
    assert PruningConfig.of(request_, target_parameters=7).target_parameters == 7
    if request_.target_parameters is None:
        assert PruningConfig.of(request_, sparsity=0.4).sparsity == 0.4
    else:
        with pytest.raises(ValueError, match="sparsity and target_parameters are two budgets"):
            PruningConfig.of(request_, sparsity=0.4)


@pytest.mark.parametrize(
    ("kinds", "method"),
    [
        (["layer"], "block_influence"),
        (["sublayer"], "block_influence"),
        (["expert"], "reap"),
        (["expert", "layer"], "reap"),
        (["mlp", "layer"], "wanda_sp"),
        (["mlp"], "wanda_sp"),
        (None, "wanda_sp"),
    ],
)
def test_the_default_method_follows_the_kinds(kinds, method):
    target = {"target_parameters": 5}
    assert PruningConfig(kinds=kinds, **target).method == method
    assert PruningConfig.of("fast", kinds=kinds, **target).method == method
