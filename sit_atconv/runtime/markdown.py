"""Markdown: tables, and text of others made harmless."""

import html
import re
from collections.abc import Collection, Iterable
from typing import Any

ACTIVE = re.compile(r"[\\`*\[\]~|]")  # within a line; < and & are HTML's


def visible(text: Any) -> str:
    """A text of others as one line in which every character can be seen; none that a terminal would act by."""
    return "".join(each if each.isprintable() else " " for each in " ".join(str(text).split()))


def plain(text: Any) -> str:
    """A text of others for a Markdown line or a table's cell: one line that can be seen, and nothing in it that acts.

    No tags, entities, links, images, code, emphasis by asterisks, or columns of a table.
    """
    return ACTIVE.sub(r"\\\g<0>", html.escape(visible(text), quote=False))


def markdown_table(head: list[str], rows: Iterable[Iterable[str]], text: Collection[str] | None = None) -> str:
    """A Markdown table, no line break at its end. text: the titles of columns of text; the others are of numbers, which
    stand at the right. None: all are text. Cells are taken as they are; text of others goes through `plain` before.
    """
    rule = ["---" if text is None or title in text else "---:" for title in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))
