"""Every situation of the table of stacks: an expanded model's numbers there are those of plain code."""

import pytest

from benchmarks.stacks.rows import rows

ROWS = list(rows())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_numbers_are_those_of_plain_code(row):
    if missing := row.missing():
        pytest.skip(f"{', '.join(missing)} not installed")
    assert row.measure() <= row.limit
