"""Text of others as Markdown, made harmless."""

import html
import re
from typing import Any

ACTIVE = re.compile(r"[\\`*\[\]~|]")  # within a line; < and & are HTML's


def plain(text: Any) -> str:
    """A text of others for a Markdown line or a table's cell: one line that can be seen, and nothing in it that acts.

    No tags, entities, links, images, code, emphasis by asterisks, or columns of a table.
    """
    line = "".join(each if each.isprintable() else " " for each in " ".join(str(text).split()))
    return ACTIVE.sub(r"\\\g<0>", html.escape(line, quote=False))
