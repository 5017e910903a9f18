"""What the user got wrong, and how a command says so."""

import argparse
import difflib
import errno
import os
import select
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

_in_command = False  # whether a command runs in this process


class InputError(ValueError):
    """A value given by the user breaks a rule; the message is one line: the value, the rule, the remedy.

    `every_rank`: the error is known to one process of a distributed run only, so that process reports it;
    otherwise all processes of a machine find the same error and the first one there speaks for them.
    """

    def __init__(self, message: str, every_rank: bool = False):
        super().__init__(" ".join(message.split()))
        self.every_rank = every_rank


@contextmanager
def told(
    what: str, *kinds: type[Exception], remedy: str = "", every_rank: bool = False, in_full: bool = False
) -> Iterator[None]:
    """Within it, an error of these kinds becomes an InputError: `what`, what the error says, the remedy.

    An InputError goes by, unless the kinds name it, or one that it derives from. Of other libraries' errors the first
    line is told, or all of it in_full; of an error of files what the system says, and the file, where `what` does not
    name it.
    """
    try:
        yield
    except kinds as error:
        named = tuple(kind for kind in kinds if issubclass(kind, InputError))
        if isinstance(error, InputError) and not isinstance(error, named):
            raise
        words = reason(error) if in_full or isinstance(error, InputError | OSError) else said(error)
        file = getattr(error, "filename", None)
        if file is not None and os.path.basename(str(file)) not in what:  # which may name it as it lies from here
            words += f": {str(file)!r}"
        text = ": ".join(filter(None, (what, words.removesuffix("."))))
        raise InputError("; ".join(filter(None, (text, remedy))), every_rank) from None


def named(what: str) -> AbstractContextManager[None]:
    """Within it, an InputError begins with what it is about."""
    return told(what, InputError)


def option(name: str, value: Any = None, python: str | None = None) -> str:
    """An argument of a library function as its caller wrote it: `sample_size` in Python, `--sample-size` in a command.

    value: what it was given, if that is to be said: `force=True` in Python, `--force` in a command.
    python: what stands there in Python, where that is no argument.
    """
    if _in_command:
        flag = f"--{name.replace('_', '-')}"
        return flag if value is None or value is True else f"{flag} {value}"
    return python or (name if value is None else f"{name}={value!r}")


def said(error: Exception) -> str:
    """The first line of an error of another library, or its name where it says nothing; for an InputError."""
    return (str(error) or type(error).__name__).splitlines()[0]


def reason(error: Exception) -> str:
    """What the system says of an error of files, without the file; of any other error all it says, or its name."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# What launchers put into the environment, and accelerate and torch read there.
WHOLE = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_PORT", "PMI_RANK", "PMI_SIZE",
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
)  # fmt: skip
PIPE = 13  # the number of SIGPIPE, by which other programs end there
MOST_PORT = (1 << 16) - 1
SWITCH = "ACCELERATE_USE_"
ON_OR_OFF = {"y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0"}


def check_launch() -> None:
    """Raise InputError where the environment says of the processes of a launch what cannot be."""
    stated = {name: os.environ[name] for name in WHOLE if name in os.environ}
    for name, text in stated.items():
        if not (text.isascii() and text.isdecimal() and int(text[:20]) < 2**31):
            raise InputError(f"{name}={text!r} in the environment: launchers give whole numbers; unset it", True)
    if int(stated.get("MASTER_PORT", 0)) > MOST_PORT:
        raise InputError(f"MASTER_PORT={stated['MASTER_PORT']!r} in the environment: ports end at {MOST_PORT}", True)
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        there = int(stated.get(size, 1))
        if size in stated and int(stated.get(rank, 0)) >= max(there, 1):
            raise InputError(f"{rank}={stated[rank]} in the environment: {size}={there}; unset both", True)
        if there > 1 and rank not in stated:
            raise InputError(f"{size}={there} in the environment without {rank}; start it with accelerate launch", True)
    if int(stated.get("WORLD_SIZE", 1)) > 1 and (host := os.environ.get("MASTER_ADDR")) is not None:
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:  # which torch would wait with, for as long as for a slow process
            rule = getattr(error, "strerror", None) or "it is no name of a machine"
            remedy = "give the name or address of the first process's machine"
            raise InputError(f"MASTER_ADDR={host!r} in the environment: {rule}; {remedy}") from None
    for name, text in os.environ.items():
        if name.startswith(SWITCH) and text.lower() not in ON_OR_OFF:
            raise InputError(f"{name}={text!r} in the environment: give true or false, or unset it", True)


def check_one_process() -> None:
    """Raise InputError where a launcher started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("this command runs in one process; start it without a launcher")


MOST = 3.4e38  # the largest number, about, that fp32 holds


def check_choice(name: str, value, choices: Iterable[str]) -> None:
    """Raise InputError unless `value` is one of `choices`; the message suggests the nearest one."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(str(value), map(str, choices), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        shown = f"choose from {sorted(choices, key=str)}" if len(choices) <= 12 else f"there are {len(choices)} choices"
        raise InputError(f"{name}={value!r}: {hint}{shown}")


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with a usage error told like any other: one line, through InputError."""

    def parse_known_args(self, args=None, namespace=None):
        for text in sys.argv[1:] if args is None else args:
            if isinstance(text, str) and text != text.encode("utf-8", "replace").decode():
                raise InputError(f"{text!r} is no UTF-8, and cannot be recorded; rename it")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise InputError(f"{message}; see `{self.prog} --help`")


def add_force(parser: argparse.ArgumentParser) -> None:
    """The option of every command that writes to --out."""
    parser.add_argument(
        "--force", action="store_true", help="set aside (NAME.aside) what is at --out and would be refused"
    )


def command(main: Callable) -> Callable:
    """Decorator for the entry point of a command: an InputError becomes one line on stderr and exit status 2.

    So do a name that is longer than the file system takes, and memory that ran out, whose size is the user's choice.
    Whatever else is raised is a fault of the program, and stays a traceback.
    """

    @wraps(main)
    def wrapped(*args, **kwargs):
        global _in_command
        before, _in_command = _in_command, True
        try:
            if hasattr(sys.stdout, "reconfigure"):  # a terminal of few characters costs no result
                sys.stdout.reconfigure(errors="backslashreplace")
            check_launch()
            returned = main(*args, **kwargs)
            if sys.stdout is not None:
                sys.stdout.flush()
            return returned
        except (InputError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                sys.exit(128 + PIPE)
            fault = of_the_user(error)
            if fault is None:
                raise
            if fault.every_rank or int(os.environ.get("LOCAL_RANK", "0")) == 0:
                print(f"error: {fault}", file=sys.stderr)
            sys.exit(2)
        finally:
            _in_command = before

    return wrapped


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has ended, as `head` does; what is left to be written there then goes
    nowhere."""
    if not hasattr(select, "poll"):  # Windows
        return False
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    ended = any(event & select.POLLERR for _, event in pipe.poll(0))
    if ended:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ended


def ran_out(error: Exception) -> bool:
    """Whether an error tells that memory ran out; torch tells of the CPU's in words alone."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error)


def of_the_user(error: Exception) -> InputError | None:
    """An error that a user can mend, as a command tells it; None for any other."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, OSError):
        long = error.errno == errno.ENAMETOOLONG
        return InputError(f"{str(error.filename)[:60]!r}...: {error.strerror}; give a shorter name") if long else None
    if ran_out(error):
        return InputError(f"out of memory: {said(error)[:200]}; take a smaller batch, size or model", every_rank=True)
    return None
