"""Tables as text."""

import subprocess
import sys


def test_the_first_table_of_a_process_draws_no_random_number():
    code = (
        "import random; before = random.getstate(); from optimum_fwdprune.words import render_table; "
        "render_table(['name'], [['value']]); assert random.getstate() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
