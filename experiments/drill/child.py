"""A trainer's command with a fault put in, or with word of what it is doing: run by the drill, not by hand.

python -m experiments.drill.child SUBJECT FAULT RANK STEP WORDS
"""

import hashlib
import importlib
import os
import sys
from pathlib import Path
from pkgutil import resolve_name

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from experiments.drill.subjects import LETTERS, SUBJECTS, Subject
from sit_atconv.training import checkpoint
from sit_atconv.training.trainer import Trainer

DONE = b"."
# Whether NaN goes in with the images, and whether it does so in later steps, too.
FAULTS = {"nan": (False, False), "nan-images": (True, False), "nan-from": (False, True)}


def announce(subject: Subject, descriptor: int) -> None:
    """Write a phase's letter to the pipe when it begins, and a dot when it is over."""

    def telling(function, phase: str):
        def wrapped(*args, **kwargs):
            os.write(descriptor, LETTERS[phase])
            result = function(*args, **kwargs)
            os.write(descriptor, DONE)
            return result

        return wrapped

    for phase, place in subject.phases.items():
        owner, method = place.rsplit(".", 1)
        setattr(resolve_name(owner), method, telling(resolve_name(place), phase))
    checkpoint.save = telling(checkpoint.save, "checkpoint")


def poison(subject: Subject, rank: int, step: int, images: bool, on: bool) -> None:
    """Make the losses of one process NaN in one step (1-based), and leave the gradients as they are.

    NaN gradients would reach the other processes by themselves: what is tried is that they agree.
    images: NaN goes in with the images instead, and through the whole model. on: in the steps that follow, too.
    """
    objective = resolve_name(subject.objective)
    losses = objective.losses
    nan = torch.tensor(float("nan"))

    def poisoned(self, batch, forward):
        here = forward.step + 1 >= step if on else forward.step + 1 == step
        bad = here and PartialState().process_index == rank
        if bad and images:
            batch = {**batch, "image": batch["image"] + nan}
        return [loss + nan if bad and not images else loss for loss in losses(self, batch, forward)]

    objective.losses = poisoned


def watch_weights() -> None:
    """Exit where the processes' models differ at a checkpoint, of which the first process alone writes its own."""
    save = Trainer._save

    def watched(self):
        found = hashlib.sha256()
        for tensor in self.objective.model.state_dict().values():
            found.update(tensor.numpy().tobytes())
        if len(set(gather_object([found.hexdigest()]))) > 1:
            sys.exit(f"the processes have different weights at step {self.step}")
        save(self)

    Trainer._save = watched


def forked(descriptor: int, facts: dict, name: str, words: list[str], announced: bool) -> None:
    """Train, in a process that was forked off; announced: with word of what it is doing."""
    subject = SUBJECTS[name]
    if announced:
        announce(subject, descriptor)
    importlib.import_module(Path(subject.script).stem).main(words)


def main() -> None:
    name, fault, rank, step, *words = sys.argv[1:]
    subject = SUBJECTS[name]
    poison(subject, int(rank), int(step), *FAULTS[fault])
    watch_weights()
    importlib.import_module(Path(subject.script).stem).main(words)


if __name__ == "__main__":
    main()
