"""tests/README.md is complete and in step with the tests that it lists."""

from processes import run_module


def test_every_fault_has_a_test_and_the_table_is_in_step() -> None:
    done = run_module("tests.faults.table", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
