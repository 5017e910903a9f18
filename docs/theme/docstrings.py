"""Docstrings of this project as Markdown, for the reference: what they say of a parameter becomes an item of a list.

A line of a docstring that begins with `name: ` or `one, another: ` is about parameters. It goes on to the next such
line, or to a line that begins with a capital letter after the end of a sentence.
"""

import re

from griffe import Extension

ITEM = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*): (\S.*)")


def as_markdown(text: str) -> str:
    """A docstring with its parameters as a list; indented blocks after an empty line stay what they are."""
    lines, inside, before = [], False, ""
    for line in text.splitlines():
        item = ITEM.fullmatch(line)
        begins = line[:1].isupper() and before.endswith((".", ")"))
        if item:
            lines += ([] if inside else [""]) + [f"- **{item[1]}**: {item[2]}"]
            inside = True
        elif inside and line and not begins:
            lines.append(f"    {line.strip()}")
        else:
            lines += ([""] if inside and line else []) + [line]
            inside = False
        before = line
    return "\n".join(lines)


class Parameters(Extension):
    """What griffe calls for every object that it has read."""

    def on_object(self, *, obj, **kwargs) -> None:
        """Turn the docstring of an object into Markdown."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
