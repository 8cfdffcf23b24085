"""A few of the random damages that ``make mutation-test`` does, each with one command that reads what was damaged."""

from __future__ import annotations

from mutations import faults, prepare


def test_no_damage_changes_a_result_without_a_word(tmp_path_factory):
    intact, expected = tmp_path_factory.mktemp("intact"), {}
    prepare(intact)
    problems = [problem for number in range(5000, 5016) for problem in faults(number, intact, expected)[1]]
    assert not problems, "\n".join(problems)
