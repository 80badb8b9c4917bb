"""Imports point down only, commands stay light, and no algorithm knows an architecture (docs/design.md)."""

import ast
from pathlib import Path

import pytest

import optimum_fwdprune


PACKAGE = Path(optimum_fwdprune.__file__).parent

# Top to bottom. A module may import what stands below it, and siblings of its own folder.
ORDER = [
    "commands",
    "pruner",
    "serving",
    "export",
    "card",
    "hub",
    "planning",
    "streaming",
    "cutting",
    "verification",
    "report",
    "recovery",
    "evaluation",
    "reproduction",
    "record",
    "scores",
    "methods",
    "search",
    "levels",
    "divergence",
    "latency",
    "rounds",
    "settling",
    "allocation",
    "surgery",
    "reconstruction",
    "sequential",
    "streams",
    "layerwise",
    "gauss_newton",
    "least_squares",
    "mask_learning",
    "policies",
    "policy_gradient",
    "sensitivity",
    "zeroth_order",
    "backprop",
    "perturbation",
    "gates",
    "statistics",
    "calibration",
    "losses",
    "checkpoints",
    "texts",
    "rows",
    "chats",
    "tokens",
    "messages",
    "saving",
    "sources",
    "tokenizing",
    "loading",
    "integrity",
    "dispatching",
    "placement",
    "offloading",
    "shelves",
    "devices",
    "budgets",
    "composing",
    "plan",
    "configuration",
    "registry",
    "architectures",
    "wrapping",
    "adapter_defaults",
    "models",
    "utils",
    "module_state",
    "progress",
    "loggers",
    "offline",
    "ranks",
    "version",
]
# What nothing may import before a command or a score function runs.
HEAVY = {"torch", "transformers", "datasets", "safetensors", "numpy"}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    """`optimum_fwdprune/scoring/methods/flap.py` -> `["methods", "flap"]`."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path, at_run_time_only=False):
    """Absolute names of what a file imports, those in functions included; annotations' imports are not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if for_types or (at_run_time_only and isinstance(node, ast.FunctionDef)):
            node.body = []
    package = ["optimum_fwdprune", *module_of(path)]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module or "").split(".") if node.module else base
            # `from . import x` names modules, `from .x import y` names what stands in one.
            yield from (".".join([*base, alias.name]) if not node.module else ".".join(base) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = (module_of(path) or ["__init__"])[0]
    if own in ("__init__", "_auto_registration"):
        return
    assert own in ORDER, f"{own} has no place in the order; give it one here and in docs/design.md"
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "optimum_fwdprune" and len(parts) > 1:
            assert parts[1] == own or ORDER.index(parts[1]) > ORDER.index(own), f"{own} imports {name}"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if module_of(path)[:1] in (["commands"], ["methods"], ["configuration"], [])],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_commands_methods_and_requests_import_nothing_heavy(path):
    assert not HEAVY & {name.split(".")[0] for name in imports_of(path, at_run_time_only=True)}


def test_the_models_folder_stands_alone():
    """It is copied beside the weights, where this package need not be installed."""
    for path in (PACKAGE / "models").glob("*.py"):
        for name in imports_of(path):
            root = name.split(".")[0]
            assert root in ("sys", "torch", "transformers", "huggingface_hub") or name.startswith(
                "optimum_fwdprune.models."
            ), f"{path.name} imports {name}"


def test_no_algorithm_names_an_architecture():
    """What differs between families stands in architectures/ and models/, and nowhere else."""
    families = [path.stem for path in (PACKAGE / "architectures").glob("*.py")]
    families = {name for name in families if (PACKAGE / "models" / f"pruned_{name}.py").exists()}
    assert families >= {"llama", "mistral", "opt", "bloom"}
    for path in FILES:
        if module_of(path)[:1] in (["architectures"], ["models"], ["export"]):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                compared = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                assert not families & compared, f"{path.name}: {text}"


def test_the_order_is_the_one_in_the_documentation():
    design = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    listing = design.partition("```\ncommands/")[2].partition("```")[0]
    names = ["commands", *(line.split()[0].removesuffix("/").removesuffix(".py") for line in listing.splitlines()[1:])]

    assert [name for name in ORDER if name != "version"] == names
    assert set(ORDER) == {(module_of(path) or ["__init__"])[0] for path in FILES} - {
        "__init__",
        "_auto_registration",
    }
