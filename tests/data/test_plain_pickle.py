"""Pickles of plain values are read as pickle reads them, and anything else is refused without being run."""

import os
import pickle
import pickletools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sit_atconv.data import plain_pickle
from sit_atconv.data.plain_pickle import load_plain

PLAIN = st.recursive(
    st.binary(max_size=300) | st.integers(-(2**70), 2**70) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.lists(inner, max_size=5).map(tuple),
    max_leaves=20,
)


def whole(value):
    """With views as bytes."""
    if isinstance(value, list | tuple):
        return type(value)(whole(part) for part in value)
    return bytes(value) if isinstance(value, memoryview) else value


@given(PLAIN, st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_plain_values_of_every_protocol(value, protocol):
    assert whole(load_plain(pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("protocol", range(6))
def test_records_headers_and_shared_values(protocol):
    record = (os.urandom(70_000), 123)
    assert whole(load_plain(pickle.dumps(record, protocol))) == record
    keys = [str(index).encode() for index in range(2500)]
    assert load_plain(pickle.dumps(keys, protocol)) == keys
    shared = [b"again"] * 3
    assert load_plain(pickle.dumps([shared, shared, ("x", "x")], protocol)) == [shared, shared, ("x", "x")]


def test_strings_of_python_2():
    assert load_plain(b"(U\x03abcK\x07t.") == (b"abc", 7)
    assert load_plain(b"(T\x03\x00\x00\x00a\xffcI7\nt.") == (b"a\xffc", 7)
    assert load_plain(b"(S'abc'\nI7\nl.") == [b"abc", 7]


def test_long_bytes_are_not_touched():
    data = pickle.dumps((bytes(5000), 3))
    image, label = load_plain(data)
    assert isinstance(image, memoryview)
    assert image.obj is data
    assert label == 3


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_run(protocol, tmp_path):
    target = tmp_path / "made"
    for evil in (
        Evil(os.mkdir, str(target)),
        (Evil(os.mkdir, str(target)), 3),
        [b"x", Evil(eval, f"open({target!r})")],
    ):
        with pytest.raises(ValueError, match=r"asks for (posix\.mkdir|builtins\.eval|__builtin__\.eval)"):
            load_plain(pickle.dumps(evil, protocol))
    assert not target.exists()


@pytest.mark.parametrize(
    ("data", "asks"),
    [
        (pickle.dumps(np.int64(3)), r"numpy.*scalar"),
        (pickle.dumps(torch.tensor(3)), "torch"),
        (pickle.dumps(Evil(print, "x"), 0), r"__builtin__\.print"),
        (b"(S'x'\nios\nsystem\n.", r"os\.system"),  # INST
        (b"c_codecs\nencode\n(Vx\nVutf7\ntR.", "_codecs.encode"),
        (b"c_codecs\nencode\n.", "_codecs.encode"),
        (b"c_codecs\nencode\n)R.", "_codecs.encode"),
        (b"X\x0e\x00\x00\x00_codecs.encodeX\x01\x00\x00\x00x\x85R.", "call of"),
        (b"\x82\x01.", "EXT1"),
        (b"Pid\n.", "PERSID"),
        (b"}.", "EMPTY_DICT"),
        (b"N.", "NONE"),
        (b"cos\nsystem\n(S'x'\no.", r"os\.system"),
        (b"(Nb.", "NONE"),
    ],
)
def test_what_is_asked_for_is_named(data, asks):
    with pytest.raises(ValueError, match=f"asks for .*{asks}"):
        load_plain(data)


@pytest.mark.filterwarnings("ignore:invalid escape")
@pytest.mark.parametrize("protocol", range(6))
def test_damage_is_a_value_error(protocol):
    data = pickle.dumps(([b"abc" * 30, "text", 7], 300), protocol)
    for end in range(len(data)):
        with pytest.raises(ValueError):
            load_plain(data[:end])
    random = np.random.default_rng(protocol)
    for _ in range(500):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[random.integers(0, len(data), 3)] = random.integers(0, 256, 3)
        try:
            load_plain(damaged.tobytes())
        except ValueError:
            continue


@pytest.mark.parametrize("data", [b".", b"K\x01K\x02.", b"h\x05.", b"t.", b"K\x01a.", b"K\x01K\x02a.", b"0.", b"\x86."])
def test_stacks_that_do_not_add_up(data):
    with pytest.raises(ValueError):
        load_plain(data)


def test_the_opcodes_are_pickletools_own():
    names = {opcode.name for opcode in pickletools.opcodes}
    assert plain_pickle.VALUES | plain_pickle.OLD_STRINGS | set(plain_pickle.BUILD) | set(plain_pickle.MEMO) <= names
    codes = {opcode.name: opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
    assert {codes[name] for name in ("BINBYTES", "BINBYTES8", "BYTEARRAY8")} == set(plain_pickle.LARGE_BYTES)
