"""Measurements on cards that people have edited."""

import pytest
from huggingface_hub import ModelCard

from optimum_fwdprune.evaluation import Comparison, Evaluation, TextLoss
from optimum_fwdprune.report.measurements import write_measurements


def comparison(text, loss):
    return Comparison([Evaluation(name, {text: TextLoss(loss, 1)}, []) for name in ("dense", "pruned")])


FIRST, SECOND = comparison("notes", 2.0), comparison("other", 3.0)
HEAD = """---
license: mit
model-index:
- name: mine
  results:
  - task:
      type: text-classification
    dataset:
      name: glue
      type: glue
    metrics:
    - type: accuracy
      value: 0.9
---
"""
BODY = """# Mine

```markdown
## Measurements

## Limits
```

## Measurements of ours

By hand.

## What each layer kept

Much.

## Limits

None.
"""


def card(tmp_path, text):
    file = tmp_path / "README.md"
    file.write_bytes(text.encode())
    return file


@pytest.mark.parametrize("head", [HEAD, ""], ids=["entries", "none"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_only_the_table_changes(head, newline, tmp_path):
    file = card(tmp_path, (head + BODY).replace("\n", newline))
    write_measurements(file, FIRST)
    once = ModelCard.load(file).text
    write_measurements(file, SECOND, FIRST)
    twice = ModelCard.load(file).text

    before, _, rest = twice.partition("## Measurements\n\n<!-- measurements -->\n")
    table, _, after = rest.partition("<!-- end of measurements -->\n\n")
    assert (before + after).strip() == BODY.strip() and after.startswith("## What each layer kept")
    assert table.startswith(SECOND.to_markdown().strip())
    assert table.strip().endswith("Perplexity is that of 1 predicted tokens of other.")
    replaced = once.replace(FIRST.to_markdown().strip(), SECOND.to_markdown().strip()).replace(
        "tokens of notes", "tokens of other"
    )
    assert replaced.strip() == twice.strip()


def test_what_was_written_around_the_table_stays(tmp_path):
    file = card(tmp_path, BODY)
    write_measurements(file, FIRST)
    text = file.read_text()
    file.write_text(
        text.replace(
            "<!-- end of measurements -->", "<!-- end of measurements -->\n\n### Our notes\n\nKeep.\n\n# Citation"
        )
    )
    write_measurements(file, SECOND, FIRST)

    assert "### Our notes\n\nKeep.\n\n# Citation" in file.read_text() and "notes |" not in file.read_text()


def test_results_of_others_stay(tmp_path):
    file = card(tmp_path, HEAD + BODY)
    write_measurements(file, FIRST)
    write_measurements(file, SECOND, FIRST)
    data = ModelCard.load(file).data

    assert [(result.dataset_name, result.metric_type) for result in data.eval_results] == [
        ("glue", "accuracy"),
        ("other", "perplexity"),
    ]
    assert data.model_name == "mine" and data.license == "mit"


def test_a_card_that_is_a_link_stays_one(tmp_path):
    target = card(tmp_path, BODY)
    link = tmp_path / "link.md"
    link.symlink_to(target)
    write_measurements(link, FIRST)

    assert link.is_symlink() and "<!-- measurements -->" in target.read_text()
