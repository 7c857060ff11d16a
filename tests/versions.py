"""What launch/test-versions.sh does with its rows. Arguments: HEAD, the file of rows, and the page to write, if any.

A row takes the place of the one in the table under HEAD that begins with the same two cells, or joins the table.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def key_of(row: str) -> list[tuple[int, str]]:
    """Return what the rows are sorted by, the numbers as numbers: the two releases that the row is about."""
    parts = re.findall(r"(\d+)|([^\d|]+|\|)", "|".join(row.split("|")[1:3]))
    return [(int(number or -1), text) for number, text in parts]


def table_of(head: str, rows: list[str]) -> str:
    rule = "|" + "---|" * (head.count("|") - 1)
    return "\n".join([head, rule, *sorted(rows, key=key_of)]) + "\n"


def with_rows(page: str, head: str, rows: list[str]) -> str:
    """Return the text of the page with these rows in the table under `head`."""
    found = re.search(rf"^{re.escape(head)}\n\|[-|]+\n((?:\|.*\n)*)", page, re.MULTILINE)
    if found is None:
        raise ValueError(f"expected a table with the head {head} in the page")
    known = {tuple(key_of(row)): row for row in [*found[1].splitlines(), *rows]}
    return page[: found.start()] + table_of(head, list(known.values())) + page[found.end() :]


if __name__ == "__main__":
    head, rows = sys.argv[1], Path(sys.argv[2]).read_text().splitlines()
    print(table_of(head, rows), end="")
    for page in map(Path, sys.argv[3:]):
        page.write_text(with_rows(page.read_text(), head, rows))
