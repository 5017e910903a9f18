"""Pickles of plain values, read without running them."""

from collections.abc import Callable
from pickletools import genops
from typing import Any

# How protocols 0 to 2 spell bytes: calls, which are known by name and worked out here, not made.
ENCODE, BYTES = "_codecs.encode", ("__builtin__.bytes", "builtins.bytes")

VALUES = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
OLD_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # Python 2's str, which are bytes
LARGE_BYTES = (b"B", b"\x8e", b"\x96")  # opcodes of BINBYTES, BINBYTES8, BYTEARRAY8
MARK = object()


def load_plain(data: bytes | memoryview) -> Any:
    """The bytes, ints, strings, tuples and lists that a pickle of any protocol holds.

    Long bytes come as a view of `data`, untouched: of a mapped file nothing is read but what lies around them.
    Raises ValueError, which names what a pickle of something else asks for.
    """
    stack, memo = [], {}
    try:
        for opcode, argument, _ in genops(_Reader(memoryview(data))):
            name = opcode.name
            if name in VALUES:
                stack.append(argument)
            elif name in OLD_STRINGS:
                stack.append(argument.encode("latin-1"))
            elif name in MEMO:
                MEMO[name](stack, memo, argument)
            elif name in BUILD:
                BUILD[name](stack)
            elif name in ("GLOBAL", "STACK_GLOBAL"):
                asked = argument.replace(" ", ".") if name == "GLOBAL" else ".".join(_popped(stack, 2))
                if asked not in (ENCODE, *BYTES):
                    raise ValueError(f"it asks for {asked}, and only plain bytes, ints, strings and lists are read")
                stack.append(_Global(asked))
            elif name == "REDUCE":
                stack.append(_bytes_of_call(*_popped(stack, 2)))
            elif name not in ("PROTO", "FRAME"):
                asked = f"{argument} ".replace(" ", ".", 1).strip() if name == "INST" else f"opcode {name}"
                raise ValueError(f"it asks for {asked}, and only plain bytes, ints, strings and lists are read")
        (value,) = stack
    except (LookupError, TypeError, AttributeError, StopIteration):
        raise ValueError("it is damaged") from None
    if isinstance(value, _Global):
        raise ValueError(f"it asks for {value}, and only plain bytes, ints, strings and lists are read")
    return value


class _Global(str):
    """The name of something that a pickle asks for."""


class _Reader:
    """What genops reads from, whose long bytes are views."""

    def __init__(self, view: memoryview):
        self.view, self.place, self.code = view, 0, b""

    def tell(self) -> int:
        return self.place

    def read(self, count: int) -> bytes | memoryview:
        part = self.view[self.place : self.place + count]
        self.place += len(part)
        if count == 1:
            self.code = bytes(part)
            return self.code
        return part if count > 8 and self.code in LARGE_BYTES else bytes(part)

    def readline(self) -> bytes:
        line = b""
        while not line.endswith(b"\n") and self.place < len(self.view):
            part = bytes(self.view[self.place : self.place + 64])
            part = part[: part.find(b"\n") + 1] or part
            self.place += len(part)
            line += part
        return line


def _popped(stack: list, count: int) -> list:
    values = stack[-count:]
    if len(values) < count:
        raise LookupError
    del stack[-count:]
    return values


def _since_mark(stack: list) -> list:
    place = next(place for place in reversed(range(len(stack))) if stack[place] is MARK)
    values = stack[place + 1 :]
    del stack[place:]
    return values


def _bytes_of_call(function: Any, arguments: Any) -> bytes:
    if isinstance(function, _Global) and arguments == () and function in BYTES:
        return b""
    if function == ENCODE and isinstance(function, _Global) and arguments[1:] in (("latin1",), ("latin-1",)):
        return arguments[0].encode("latin-1")
    raise ValueError(f"it asks for a call of {function}, and only plain bytes, ints, strings and lists are read")


def _extend(stack: list, values: list) -> None:
    if not isinstance(stack[-1], list):
        raise TypeError
    stack[-1].extend(values)


BUILD: dict[str, Callable[[list], None]] = {
    "STOP": lambda stack: None,
    "MARK": lambda stack: stack.append(MARK),
    "EMPTY_TUPLE": lambda stack: stack.append(()),
    "TUPLE1": lambda stack: stack.append(tuple(_popped(stack, 1))),
    "TUPLE2": lambda stack: stack.append(tuple(_popped(stack, 2))),
    "TUPLE3": lambda stack: stack.append(tuple(_popped(stack, 3))),
    "TUPLE": lambda stack: stack.append(tuple(_since_mark(stack))),
    "EMPTY_LIST": lambda stack: stack.append([]),
    "LIST": lambda stack: stack.append(_since_mark(stack)),
    "APPEND": lambda stack: _extend(stack, _popped(stack, 1)),
    "APPENDS": lambda stack: _extend(stack, _since_mark(stack)),
}


def _put(stack: list, memo: dict, key: int) -> None:
    memo[key] = stack[-1]


def _get(stack: list, memo: dict, key: int) -> None:
    stack.append(memo[key])


MEMO: dict[str, Callable[[list, dict, Any], None]] = {
    "PUT": _put, "BINPUT": _put, "LONG_BINPUT": _put, "GET": _get, "BINGET": _get, "LONG_BINGET": _get,
    "MEMOIZE": lambda stack, memo, _: _put(stack, memo, len(memo)),
}  # fmt: skip
