"""train_sit.py with a fault put in, or with word of what it is doing: run by the drill, not by hand.

python -m experiments.drill.child [--announce FD] [--nan RANK:STEP] -- ARGUMENTS OF train_sit.py
"""

import argparse
import os
import sys

import torch

import train_sit
from sit_atconv import checkpoint
from sit_atconv.training.loop import _Trainer

PHASES = {"step": b"s", "preview": b"p", "snapshot": b"e", "checkpoint": b"c"}
DONE = b"."


def announce(descriptor: int) -> None:
    """Write a phase's letter to the pipe when it begins, and a dot when it is over."""

    def telling(function, phase: str):
        def wrapped(*args, **kwargs):
            os.write(descriptor, PHASES[phase])
            result = function(*args, **kwargs)
            os.write(descriptor, DONE)
            return result

        return wrapped

    _Trainer._optimize = telling(_Trainer._optimize, "step")
    _Trainer._draw_preview = telling(_Trainer._draw_preview, "preview")
    _Trainer._snapshot = telling(_Trainer._snapshot, "snapshot")
    checkpoint.save = telling(checkpoint.save, "checkpoint")


def poison(rank: int, step: int) -> None:
    """Make the losses of one process NaN in one step (1-based), and leave the gradients as they are.

    NaN gradients would reach the other processes by themselves: what is tried is that they agree.
    """
    losses = _Trainer._losses

    def poisoned(self, batch):
        bad = self.step + 1 == step and self.accelerator.process_index == rank
        return [loss + torch.tensor(float("nan")) if bad else loss for loss in losses(self, batch)]

    _Trainer._losses = poisoned


def main() -> None:
    own, arguments = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    parser = argparse.ArgumentParser()
    parser.add_argument("--announce", type=int)
    parser.add_argument("--nan")
    args = parser.parse_args(own)
    if args.announce is not None:
        announce(args.announce)
    if args.nan:
        poison(*map(int, args.nan.split(":")))
    train_sit.main(arguments)


if __name__ == "__main__":
    main()
