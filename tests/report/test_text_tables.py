"""Tables as text: Markdown and columns, and rows that do not fit."""

import pytest

from hf_compressm.report.text_tables import aligned_table, markdown_table, mean_and_deviation


def test_markdown_has_a_rule_below_the_headings_and_short_empty_cells():
    assert markdown_table(["", "states"], [["a", 4], ["b", ""]]) == "| | states |\n|---|---|\n| a | 4 |\n| b | |"


def test_columns_are_as_wide_as_their_widest_cell():
    assert aligned_table(["layer", "n"], [["a", 128], ["longer", 4]]).splitlines() == [
        *("layer     n", "a       128", "longer    4"),
    ]


@pytest.mark.parametrize("write", [markdown_table, aligned_table])
def test_a_row_of_another_length_is_refused(write):
    with pytest.raises(ValueError, match=r"a row must have 2 cells, one for each of \['a', 'b'\]; got \[1\]"):
        write(["a", "b"], [[1, 2], [1]])


def test_a_single_value_has_no_deviation():
    assert (mean_and_deviation([1.0, 3.0], 2), mean_and_deviation([1.0], 1)) == ("2.00 ± 1.41", "1.0")
