"""Tables and differences as text."""

import subprocess
import sys

import pytest

from optimum_fwdprune.words import first_difference


def test_the_first_table_of_a_process_draws_no_random_number():
    code = (
        "import random; before = random.getstate(); from optimum_fwdprune.words import render_table; "
        "render_table(['name'], [['value']]); assert random.getstate() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("stored", "expected", "clause"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "its b is 1, this one's is 2"),
        ({"a": {"b": 1}}, {"a": {"c": 1}}, "it has no c, and this one has"),
        ({"a": 1, "b": 2}, {"a": 1}, "it has b, and this one has not"),
        ({"a": 1, "b": [2]}, {"b": [2], "a": 1}, None),
        # An option that an earlier version did not have, and that has no value.
        ({"a": 1}, {"a": 1, "b": None}, None),
        ({"a": {"b": None}, "c": 1}, {"a": {}, "c": 2}, "its c is 1, this one's is 2"),
    ],
)
def test_the_first_difference_names_what_is_missing(stored, expected, clause):
    assert first_difference(stored, expected) == clause
