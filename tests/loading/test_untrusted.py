"""Checkpoints that were damaged or made up: one readable error, never a hang, a crash, or half a result."""

import ast
import copy
import json
import shutil
from pathlib import Path

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import optimum_fwdprune
from optimum_fwdprune import FwdPruner


FILES = ("config.json", "fwdprune_plan.json", "fwdprune_config.json", "generation_config.json")
WEIGHTS = "model.safetensors"

# What a hand or a fault puts in the place of a value, sizes beyond any memory among it.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([10**6, 10**9, 2**31, 2**63, 10**30, -1]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-1, 70), max_size=4),
    st.dictionaries(st.sampled_from(["0", "1", "99999999", "mlp", "x"]), st.integers(-1, 70), max_size=2),
)


@pytest.fixture(scope="module", params=["llama_gqa_biases", "bloom"])
def pruned(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrusted")
    pruner = FwdPruner(tiny.make_model(request.param))
    pruner.prune(tiny.request(method="magnitude", sparsity=0.4, scope="global"))
    pruner.save_pretrained(folder / "good")
    return folder


def places_in(value, path=()):
    """Every path into a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places_in(inner, (*path, key))


def replaced(document, path, value):
    document = copy.deepcopy(document)
    if not path:
        return value
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return document


def loads_or_says_why(folder, changed):
    """Load a checkpoint, use what it says of itself, and put the file that was changed back."""
    again = folder.parent / "again"
    try:
        pruner = FwdPruner.from_pretrained(folder)
        pruner.save_pretrained(again)
    except Exception as error:
        assert str(error).strip(), repr(error)
    else:
        # Out of reach of the handler above, which would take a failed assertion for an error that was said.
        assert not any(parameter.is_meta for parameter in pruner.model.parameters())
        FwdPruner.from_pretrained(again)
    finally:
        left = [path.name for path in folder.parent.iterdir() if path.name not in ("good", "bad", "again")]
        shutil.rmtree(again, ignore_errors=True)
        shutil.copy(folder.parent / "good" / changed, folder / changed)
    assert not left


@pytest.fixture
def bad(pruned):
    folder = pruned / "bad"
    shutil.copytree(pruned / "good", folder)
    yield folder
    shutil.rmtree(folder)


# A copy of the checkpoint serves all cases of a test, which write the same file anew.
FUZZ = settings(
    # A quarter of the profile's: `make fuzz` takes another profile.
    max_examples=settings.default.max_examples // 4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(data=st.data())
def test_a_changed_value_is_refused_or_harmless(bad, data):
    name = data.draw(st.sampled_from(FILES))
    document = json.loads((bad.parent / "good" / name).read_text())
    path = data.draw(st.sampled_from(list(places_in(document))))
    (bad / name).write_text(json.dumps(replaced(document, path, data.draw(VALUES))))
    loads_or_says_why(bad, name)


@FUZZ
@given(data=st.data())
def test_bytes_that_were_lost_or_changed_are_refused_or_harmless(bad, data):
    name = data.draw(st.sampled_from((*FILES, WEIGHTS)))
    content = bytearray((bad.parent / "good" / name).read_bytes())
    # Headers are what sizes are read from.
    place = data.draw(st.integers(0, min(len(content), 4000) - 1))
    if data.draw(st.booleans()):
        content[place] = data.draw(st.integers(0, 255))
    else:
        del content[place : place + data.draw(st.integers(1, len(content)))]
    (bad / name).write_bytes(content)
    loads_or_says_why(bad, name)


@FUZZ
@given(data=st.data())
def test_a_header_that_lies_is_refused_or_harmless(bad, data):
    content = (bad.parent / "good" / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    path = data.draw(st.sampled_from([path for path in places_in(header) if path]))
    header = json.dumps(replaced(header, path, data.draw(VALUES))).encode()
    (bad / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    loads_or_says_why(bad, WEIGHTS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "describes 1000000000 layers"),
        ("vocab_size", 10**12, r"lm_head.weight has the shape \[300, 48\] in the weights"),
        ("hidden_size", 0, "describes no model|by its config.json"),
    ],
)
def test_sizes_that_no_weights_stand_behind_are_refused_before_memory_is_taken(tmp_path, key, value, message):
    tiny.make_model("llama_mqa").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=message):
        FwdPruner.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "weights.bin", 3])
def test_weights_are_read_from_beside_their_index_only(tmp_path, name):
    tiny.make_model("llama_mqa").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).rename(tmp_path / WEIGHTS)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"in the same folder|not an index of weight files"):
        FwdPruner.from_pretrained(tmp_path / "model")


def test_a_pruned_checkpoint_that_lacks_weights_is_refused(pruned, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(pruned / "good", tmp_path / "less")
    tensors = load_file(tmp_path / "less" / WEIGHTS)
    first = next(iter(sorted(name for name in tensors if "0.mlp" in name)))
    del tensors[first]
    save_file(tensors, tmp_path / "less" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lack 1 of the parameters.*{first}"):
        FwdPruner.from_pretrained(tmp_path / "less")


def test_a_bare_dense_model_is_given_its_head_by_transformers(tmp_path):
    """With a warning of transformers' own: what dense checkpoints lack is theirs to judge."""
    tiny.make_model("llama_mqa").model.save_pretrained(tmp_path / "bare")
    assert FwdPruner.from_pretrained(tmp_path / "bare").plan is None


def test_nothing_here_reads_or_writes_pickles():
    """By name: `pickle`, `torch.load`, `torch.save`, `eval` and `exec` stand nowhere in the package."""
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "eval", "exec"}
    for path in Path(optimum_fwdprune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in forbidden, path
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in forbidden, (path, node.lineno)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                base = node.func.value
                torch_io = isinstance(base, ast.Name) and base.id == "torch" and node.func.attr in ("load", "save")
                assert not torch_io, (path, node.lineno)
