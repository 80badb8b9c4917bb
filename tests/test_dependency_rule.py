"""The rule of the rooms, sizes, light commands, and algorithms that know no architecture (contributing/design.md)."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import optimum_fwdprune


PACKAGE = Path(optimum_fwdprune.__file__).parent

# Top to bottom: folders, and the modules that stand beside them.
ROOMS = [
    "commands",
    "pruner",
    "sweep",
    "pruning",
    "export",
    "checkpoint",
    "report",
    "recovery",
    "record",
    "evaluation",
    "planning",
    "scoring",
    "cutting",
    "reconstruction",
    "allocation",
    "forward",
    "data",
    "loading",
    "architectures",
    "models",
    "request",
    "runs",
    "files",
    "words",
    "version",
]
# The door of the package: what it imports is imported when it is first used.
DOOR = ("__init__", "_auto_registration")
# What nothing may import before a command or a score function runs.
HEAVY = {"torch", "transformers", "datasets", "safetensors", "numpy"}
LIGHT = (["commands"], ["scoring", "methods"], ["request"], ["scoring"])
FILES = sorted(PACKAGE.rglob("*.py"))

MOST_LINES = 300
MOST_PARAMETERS = 6
# Of code: lines that are neither blank nor a comment nor part of a docstring.
MOST_LINES_OF_FWD_PRUNER = 200


def module_of(path):
    """`optimum_fwdprune/scoring/methods/flap.py` -> `["scoring", "methods", "flap"]`."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def room_of(path):
    return (module_of(path) or ["__init__"])[0]


def imports_of(path, at_run_time_only=False):
    """Absolute names of the modules that a file imports, those in functions and for annotations included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if at_run_time_only:
        for node in ast.walk(tree):
            for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            if for_types or isinstance(node, ast.FunctionDef):
                node.body = []
    package = ["optimum_fwdprune", *module_of(path)]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                # `from .room import module` names a module, `from .module import name` names what stands in one.
                module = [*base, alias.name]
                is_module = PACKAGE.parent.joinpath(*module).with_suffix(".py").exists()
                yield ".".join(module if is_module else base)


def functions_of(node, prefix=""):
    """Qualified names and nodes of all functions in `node`, those in classes and functions included."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if named and not isinstance(child, ast.ClassDef):
            yield f"{prefix}{child.name}", child
        yield from functions_of(child, f"{prefix}{child.name}." if named else prefix)


def parameters_of(function):
    """Names of all parameters but `self` and `cls`, with `*args` and `**kwargs` as one each."""
    arguments = function.args
    rest = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *rest]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_below_it(path):
    own = room_of(path)
    if own in DOOR:
        return
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "optimum_fwdprune" and len(parts) > 1:
            assert parts[1] == own or ROOMS.index(parts[1]) > ROOMS.index(own), f"{own} imports {name}"


def test_modules_of_a_room_import_each_other_without_cycles():
    imports = {}
    for path in FILES:
        own = ".".join(["optimum_fwdprune", *module_of(path)])
        imports[own] = {name for name in imports_of(path) if name != own}

    # Raises CycleError, which names the modules of a cycle.
    TopologicalSorter(imports).prepare()


def test_no_module_is_longer_than_one_can_read_in_one_sitting():
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES
    }

    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_no_function_has_more_parameters_than_one_can_keep_in_mind():
    exceeding = {
        f"{path.relative_to(PACKAGE).as_posix()} {name}"
        for path in FILES
        for name, function in functions_of(ast.parse(path.read_text(encoding="utf-8")))
        if len(parameters_of(function)) > MOST_PARAMETERS
    }

    assert exceeding == set()


def test_fwd_pruner_has_no_stage_in_it():
    source = (PACKAGE / "pruner.py").read_text(encoding="utf-8")
    (pruner,) = (node for node in ast.parse(source).body if getattr(node, "name", None) == "FwdPruner")
    documented = {
        line
        for node in ast.walk(pruner)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    lines = dict(enumerate(source.splitlines(), 1))
    code = [
        number
        for number in range(pruner.lineno, pruner.end_lineno + 1)
        if number not in documented and lines[number].strip() and not lines[number].strip().startswith("#")
    ]

    assert len(code) < MOST_LINES_OF_FWD_PRUNER
    assert not [node for node in ast.walk(pruner) if isinstance(node, (ast.For, ast.While))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imported_modules_of_this_package_exist(path):
    for name in imports_of(path):
        if name.split(".")[0] == "optimum_fwdprune":
            module = PACKAGE.parent.joinpath(*name.split("."))
            assert module.with_suffix(".py").exists() or (module / "__init__.py").exists(), name


def test_every_room_says_what_it_is_for():
    for room in (path for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE):
        assert ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))), room


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if module_of(path) in LIGHT or module_of(path)[:-1] in LIGHT[:3] or not module_of(path)],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_commands_methods_and_requests_import_nothing_heavy(path):
    assert not HEAVY & {name.split(".")[0] for name in imports_of(path, at_run_time_only=True)}


def test_the_models_folder_stands_alone():
    """It is copied beside the weights, where this package need not be installed."""
    for path in (PACKAGE / "models").glob("*.py"):
        for name in imports_of(path):
            root = name.split(".")[0]
            installed = {*sys.stdlib_module_names, "torch", "transformers", "huggingface_hub"}
            assert root in installed or name.startswith("optimum_fwdprune.models."), f"{path.name} imports {name}"


def test_no_algorithm_names_an_architecture():
    """What differs between families stands in architectures/ and models/, and nowhere else."""
    families = {path.stem.removeprefix("pruned_") for path in (PACKAGE / "models").glob("pruned_*.py")}
    assert families >= {"llama", "mistral", "opt", "bloom"}
    for path in FILES:
        if room_of(path) in ("architectures", "models", "export"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                compared = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                assert not families & compared, f"{path.name}: {text}"


def test_the_rooms_are_those_in_the_documentation():
    design = (PACKAGE.parent / "docs" / "contributing" / "design.md").read_text(encoding="utf-8")
    listing = design.partition("```\ncommands/")[2].partition("```")[0]
    lines = ["commands/", *listing.splitlines()[1:]]
    names = [line.split()[0].removesuffix("/").removesuffix(".py") for line in lines if not line.startswith(" ")]

    assert [name for name in ROOMS if name != "version"] == names
    assert set(ROOMS) == {room_of(path) for path in FILES} - {*DOOR}
