"""Comparison of settings, as JSON has them: what keeps one thing from being another, in words."""

import json
from collections.abc import Collection
from typing import Any


def flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """{"section": {"key": value}} as {"section.key": value}. An empty section has no keys."""
    found = {}
    for key, value in settings.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def compared(settings: dict[str, Any], passed_over: Collection[str]) -> dict[str, Any]:
    """`flat`, without the keys in `passed_over` and those of the sections there."""

    def is_compared(key: str) -> bool:
        parts = key.split(".")
        return not any(".".join(parts[:count]) in passed_over for count in range(1, len(parts) + 1))

    return {key: value for key, value in flat(settings).items() if is_compared(key)}


def differences(old: dict[str, Any], new: dict[str, Any], passed_over: Collection[str] = ()) -> list[str]:
    """`key: old -> new` for every key that differs, in the order of `new`. A key that is not there is null.

    passed_over: keys and sections that are not compared. Of lists of one length, the first item that differs is named.
    """
    before, after = compared(old, passed_over), compared(new, passed_over)
    found = []
    for key in dict.fromkeys([*after, *before]):
        was, now = before.get(key), after.get(key)
        if was == now:
            continue
        if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
            index = next(index for index, pair in enumerate(zip(was, now, strict=True)) if pair[0] != pair[1])
            key, was, now = f"{key}.{index}", was[index], now[index]
        found.append(f"{key}: {short(was)} -> {short(now)}")
    return found


def short(value: Any) -> str:
    """A JSON value for a message: the beginning of a long one."""
    text = json.dumps(value)
    return text if len(text) <= 72 else f"{text[:60]}... ({len(text)} characters)"
