"""Every Python and shell block of README.md and docs/ runs, on tiny models in the place of real ones.

Blocks of a page run in order, in one namespace and one empty folder, as a reader would run them. A block that cannot
run here says why in an HTML comment before it, `<!-- not run: REASON -->`; anything else that fails is an error.
Found and evaluated with Sybil.
"""

import ast
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import third_party_persimmon
import tiny
import torch
from optimum.commands.optimum_cli import main
from stand_ins import wikitext
from sybil import Document, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from optimum_fwdprune import FwdPruner, PruningConfig


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^>]*) -->\s*\Z")

# Pruned models that a page takes for granted because another page made them.
PRUNED = {
    "how_to/evaluation.md": ("pruned", "pruned-30", "pruned-50"),
    "how_to/gguf.md": ("pruned",),
    "how_to/gpu_24gb.md": ("smollm2-pruned",),
    "how_to/publishing.md": ("smollm2-pruned",),
    "how_to/recovery.md": ("smollm2-pruned",),
    "how_to/report.md": ("pruned", "pruned-20", "pruned-40"),
    "how_to/trainers.md": ("smollm2-pruned",),
    "reference/json.md": ("pruned",),
}
# Options of commands whose defaults would time tiny models for long.
QUICKER = dict.fromkeys(("benchmark", "compare", "sweep"), ("--repeats", "1", "--new_tokens", "2"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page, workplace, checkpoints):
    document = Document.parse(str(page), blocks)
    for name in PRUNED.get(page.relative_to(ROOT).as_posix().removeprefix("docs/"), ()):
        shutil.copytree(checkpoints / "pruned", name)
    document.namespace.update(names_of(page))

    for example in document.examples():
        example.evaluate()


def test_a_block_that_fails_is_an_error_unless_it_is_marked(tmp_path):
    page = tmp_path / "page.md"
    block = "```python\nraise ZeroDivisionError\n```\n"
    page.write_text(f"<!-- not run: needs a GPU -->\n{block}")
    assert not list(Document.parse(str(page), blocks))

    for text in (block, f"<!-- not run: -->\n{block}", f"<!-- not run: needs a GPU -->\n\nText.\n{block}"):
        page.write_text(text)
        with pytest.raises(ZeroDivisionError):
            next(iter(Document.parse(str(page), blocks))).evaluate()
    page.write_text("```bash\nrm -r everything\n```\n")
    with pytest.raises(AssertionError, match="no stand-in for `rm`"):
        next(iter(Document.parse(str(page), blocks))).evaluate()


def blocks(document):
    """Parse the fenced blocks that run: Python and shell without a marker; other languages must be known."""
    for region in FencedCodeBlockLexer(r"\w*")(document):
        language = region.lexemes["language"]
        assert language in (*EVALUATORS, "", "bibtex"), f"{document.path}: what is {language!r}?"
        if language in EVALUATORS and not marked(document, region):
            source = region.lexemes["source"]
            yield Region(region.start, region.end, parsed=source, evaluator=EVALUATORS[language])


def marked(document, region):
    found = NOT_RUN.search(document.text[: region.start])
    return bool(found and found["reason"].strip())


def shell(example):
    """Run a block's commands: `optimum-cli` in this process; what would install or take hours is only checked."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] in COMMANDS, f"{example.path}, line {example.line}: no stand-in for `{words[0]}`"
            COMMANDS[words[0]](words[1:])


def optimum_cli(arguments):
    for word in arguments[2:]:
        # A reader's own name, written anew by the next command.
        if word == "OUTPUT" and arguments[1] == "prune":
            shutil.rmtree(word, ignore_errors=True)
    before, sys.argv = sys.argv, ["optimum-cli", *arguments, *QUICKER.get(arguments[1], ())]
    try:
        main()
    except SystemExit as error:
        assert not error.code, f"{shlex.join(sys.argv)} ended with {error.code}"
    finally:
        sys.argv = before


def make(arguments):
    """The target exists, and its recipe can be put together."""
    subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)


def pip(arguments):
    """Every extra that is named exists."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = {name for word in arguments for group in re.findall(r"\[(.+)\]", word) for name in group.split(",")}
    assert named <= set(setup["options.extras_require"]), f"no such extra among {named}"


COMMANDS = {"optimum-cli": optimum_cli, "make": make, "pip": pip}
EVALUATORS = {"python": PythonEvaluator(), "bash": shell}


def names_of(page):
    """What the text around a page's blocks has introduced."""
    if page.name == "add_an_architecture.md":
        return {**vars(third_party_persimmon), "sys": sys}
    pruner = FwdPruner.from_pretrained("MODEL")
    rows = [row["text"] for row in wikitext()]
    return {
        "FwdPruner": FwdPruner,
        "config": tiny.request(),
        "PruningConfig": PruningConfig,
        "input_ids": torch.arange(900) % tiny.VOCAB,
        "model": pruner.model,
        "my_texts": rows,
        "pruner": pruner,
        "texts": rows,
    }


def test_what_is_shown_for_use_without_the_package_runs_without_it(checkpoints, tmp_path, python_without_the_package):
    shutil.copytree(checkpoints / "pruned", tmp_path / "pruned")
    tour = (ROOT / "docs" / "get_started" / "quick_tour.md").read_text()
    tour = tour.partition('=== "without it"')[2].partition("##")[0]
    card = (checkpoints / "pruned" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    shown = {"the quick tour": textwrap.dedent(tour.split("```python")[1].split("```")[0]), "the card": card}
    for name, code in shown.items():
        code = code.replace('"smollm2-20"', '"pruned"') + "\nprint(type(model).__name__, len(tokenizer))"
        # Nobody is there to answer whether code may run.
        run = {"cwd": tmp_path, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        done = subprocess.run([python_without_the_package, "-c", code], **run)

        assert done.stdout.startswith("PrunedLlamaForCausalLM 290"), (name, done.stdout, done.stderr)


@pytest.mark.parametrize("script", ["command_reference", "options", "sparsity_table", "supported_models"])
def test_pages_written_by_scripts_are_up_to_date(script):
    # In a process of its own: other tests register methods and families in this one.
    show = f"import json, {script}; print(json.dumps({{str(path): text for path, text in {script}.files().items()}}))"
    command = [sys.executable, "-c", show]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "benchmarks", ROOT)))}
    written = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    for page, text in json.loads(written.stdout).items():
        assert Path(page).read_text() == text, f"run: python benchmarks/{script}.py"


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_of_pages_outside_the_site_lead_to_files(page):
    """`make docs` checks the links between pages of the site."""
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)|src(?:set)?=\"([^\":]+)\"", text)

    assert [target for target in map("".join, targets) if not (ROOT / target).exists()] == []


def test_error_messages_of_the_documentation_are_those_of_the_code():
    """Of a message with values the constant parts are compared; the page has an ellipsis for each value."""
    messages = " ".join(
        " ".join(constant_text(node).split())
        for file in (ROOT / "optimum_fwdprune").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.JoinedStr, ast.Constant))
    )
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    tables = page.replace(page[page.index("Messages of transformers:") : page.index("## The request")], "")
    shown = re.findall(r"^\| `([^`]+)`", tables, re.MULTILINE)

    assert len(shown) > 20
    for message in shown:
        assert all(part.strip() in messages for part in message.split("…")), message


def constant_text(node):
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node.value, str) else ""


def test_pages_that_the_code_names_exist():
    named = {}
    for folder in ("optimum_fwdprune", "benchmarks", "tests", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for page in re.findall(r"docs/[\w/]+\.(?:md|svg)", file.read_text()):
                named.setdefault(page, file)

    assert {page: file for page, file in named.items() if not (ROOT / page).exists()} == {}
