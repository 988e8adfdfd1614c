"""tests/README.md is complete and in step with the tests that it lists."""

from tests.faults.table import README, collected, missing, table


def test_every_fault_has_a_test_and_the_table_is_in_step() -> None:
    shown = collected()
    assert missing(shown) == []
    assert table(shown) == README.read_text(), "tests/README.md is stale: make faults"
