"""HTML and SVG as text, where every string that is not markup already is escaped."""

import html
import re
from collections.abc import Iterable


class Markup(str):
    """Text that is markup, and stands in a page as it is."""


Content = str | int | float | None | Iterable["Content"]


def markup(content: Content) -> Markup:
    """Content as markup: strings and numbers escaped, None as nothing, the parts of an iterable one after another."""
    if content is None:
        return Markup()
    if isinstance(content, Markup):
        return content
    if isinstance(content, str | int | float):
        return Markup(html.escape(str(content)))
    return Markup("".join(map(markup, content)))


def tag(name: str, /, *content: Content, **attributes: str | int | float | bool | None) -> Markup:
    """An element. Attributes: a trailing _ is dropped, another one is a hyphen; None or False leaves one out; a float
    has one digit after the point."""
    given = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            text = "" if value is True else f"{value:.1f}" if isinstance(value, float) else html.escape(str(value))
            given += f' {key.rstrip("_").replace("_", "-")}="{text}"'
    inner = markup(content)
    return Markup(f"<{name}{given}>" if name in ("img", "meta", "wbr") else f"<{name}{given}>{inner}</{name}>")


# Where a name may go on in the next line: after a sign that parts it, but not within a number.
SAFE = re.compile(r"(?<=[/_=:])(?=[^\s/_=:])|(?<=\.)(?=[^\W\d])")
HASH = re.compile("(?:[0-9a-f]{8}){3,}")


def breakable(text: str) -> Markup:
    """A text of which paths, dotted keys and hashes may go on in the next line, at signs that part them and after every
    eighth digit; no word and no number may."""
    pieces = []
    for part in SAFE.split(text):
        pieces += re.findall(".{8}", part) if HASH.fullmatch(part) else [part]
    return Markup(tag("wbr").join(map(markup, pieces)))
