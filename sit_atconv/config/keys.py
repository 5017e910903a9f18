"""Every key of a recipe with its default, its choices, and the comment that stands at it in the schema."""

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
from typing import Any

from omegaconf import MISSING

from sit_atconv.runtime.fields import CHOICES, DEFAULT, HELP, WHEN


def keys_text(schema: type) -> str:
    """All keys of a schema, section by section, one a line."""
    lines = ["# KEY=DEFAULT  # what it does. (*): a run may go on with another value."]
    for section in dataclasses.fields(schema):
        lines += ["", f"# {section.name}: {_first_sentence(section.type)}"]
        comments = comments_of(section.type)
        for entry in dataclasses.fields(section.type):
            star = " (*)" if True in (section.metadata.get("mutable"), entry.metadata.get("mutable")) else ""
            said = _said(entry, comments.get(entry.name, ""))
            lines.append(f"{section.name}.{entry.name}={_default(entry)}{star}{f'  # {said}' if said else ''}")
    return "\n".join(lines)


def comments_of(section: type) -> dict[str, str]:
    """The comment of each field of a dataclass, by its name: what ends its lines, or else the lines above it.

    A field that a class has from another has that one's comment.
    """
    found: dict[str, str] = {}
    for each in reversed(section.__mro__):
        if dataclasses.is_dataclass(each):
            found |= _comments_in(textwrap.dedent(inspect.getsource(each)))
    return found


def _comments_in(source: str) -> dict[str, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: (token.string.removeprefix("#").strip(), token.line.lstrip().startswith("#"))
        for token in tokens
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt:")
    }  # fmt: skip
    found = {}
    for field in ast.parse(source).body[0].body:
        if not isinstance(field, ast.AnnAssign):
            continue
        texts = [comments[line][0] for line in range(field.lineno, field.end_lineno + 1) if line in comments]
        first = field.lineno
        while comments.get(first - 1, ("", False))[1]:
            first -= 1
        texts = texts or [comments[line][0] for line in range(first, field.lineno)]
        found[field.target.id] = " ".join(texts)
    return found


def _first_sentence(section: type) -> str:
    return " ".join(inspect.getdoc(section).partition("\n\n")[0].split())


def _default(entry: dataclasses.Field) -> str:
    if entry.default is MISSING:
        return "runs/RECIPE-MODEL"
    value: Any = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    return value if isinstance(value, str) else json.dumps(value)


def _said(entry: dataclasses.Field, comment: str) -> str:
    parts = [comment or entry.metadata.get(HELP, "")]
    if CHOICES in entry.metadata:
        parts.append("one of " + ", ".join("null" if each is None else str(each) for each in entry.metadata[CHOICES]))
    if WHEN in entry.metadata:
        stands = entry.metadata[DEFAULT]
        meant = "" if stands is None else f", where null means {stands}"
        parts.append(f"only with {entry.metadata[WHEN].text}{meant}")
    return "; ".join(filter(None, parts))
