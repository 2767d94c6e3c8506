"""Every situation of the table of stacks: an expanded model's numbers there are those of plain code."""

import pytest

from benchmarks.stacks.rows import rows

# rows of one run go to one worker, or it would run there again
ROWS = [pytest.param(row, id=row.title, marks=pytest.mark.xdist_group(row.run)) for row in rows()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS)
def test_numbers_are_those_of_plain_code(row):
    if missing := row.missing():
        pytest.skip(f"{', '.join(missing)} not installed")
    assert row.measure() <= row.limit
