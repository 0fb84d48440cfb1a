"""Text table: rows as aligned lines of text."""

from __future__ import annotations

from ppsim.export.table_cells import Table, cell_text, columns_of


def text_table(rows: Table) -> str:
    """Write rows as lines, under a line of headings.

    Parameters
    ----------
    rows : sequence of mappings
        Column name -> value. Columns are those of all rows; a missing value shows as a dash. Columns of amounts
        ("12.5", "12.5 ms", 3) are right-aligned. Floats get four significant digits.

    Examples
    --------
    >>> print(text_table([{"schedule": "afab", "step": "27.0 ms", "held": 8000}, {"schedule": "1f1b", "step": "9 ms"}]))
    schedule     step   held
    afab      27.0 ms  8,000
    1f1b         9 ms      –
    """
    columns = columns_of(rows)
    lines = [[*columns], *([cell_text(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if is_amount else cell.ljust(width)
            for cell, width, is_amount in zip(line, widths, columns.values(), strict=True)
        ).rstrip()
        for line in lines
    )
