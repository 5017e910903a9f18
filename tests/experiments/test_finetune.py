"""Fine-tuning on digits: which images an arm sees, what its command says, and the table."""

import numpy as np
import torch

from experiments.finetune import FIRST, OF_FIRST, SECOND, TASKS, of_classes, table, tuning, write_digits
from sit_atconv.config import load_recipe
from sit_atconv.data import open_dataset
from sit_atconv.data.digits import Digits
from sit_atconv.data.images import in_range


def test_an_arm_sees_the_digits_of_its_classes_alone(tmp_path):
    write_digits(tmp_path / "digits-5-9.npz", SECOND)
    recipe = load_recipe(*_stated(tmp_path, TASKS["digits 5 to 9 as new classes"][0]))
    dataset, whole = open_dataset(recipe.data), Digits("train")
    chosen = [index for index, label in enumerate(whole.labels) if label >= 5]
    assert dataset.class_names == tuple("01234")
    assert dataset.labels.tolist() == [whole.labels[index] - 5 for index in chosen]
    images = torch.stack([in_range(dataset[index, False][0]) for index in range(len(dataset))])
    assert (images - whole.images[chosen]).abs().max() < 0.004
    held_out = of_classes("test", FIRST)
    assert len(held_out.labels) == np.isin(Digits("test").labels, range(5)).sum()
    assert set(held_out.labels) == set(range(5))


def _stated(runs, arm):
    _, path, *overrides = tuning(7).command(runs, arm, 2)
    return path, overrides


def test_every_arm_is_a_recipe_of_equal_steps_that_begins_from_its_source(tmp_path):
    for task in TASKS.values():
        for arm in task:
            recipe = load_recipe(*_stated(tmp_path, arm))
            assert recipe.train.max_steps == 7
            assert recipe.run.seed == 2
            source = arm.source and str(tmp_path / f"finetune-{arm.source.name}-seed2")
            assert recipe.train.init == source
            assert (recipe.lora.rank is not None) == arm.name.endswith("lora")
    assert load_recipe(*_stated(tmp_path, OF_FIRST)).data.root.endswith("digits-0-4.npz")


def test_the_table_compares_within_a_seed():
    results = [
        {"arm": arm.name, "seed": seed, "loss": 0.5 + 0.1 * seed - 0.2 * number + 0.01 * number * seed}
        for task in TASKS.values() for number, arm in enumerate(task) for seed in (0, 1)
    ]  # fmt: skip
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table(results).splitlines()]
    assert lines[2][2:] == ["0.5500 ± 0.0707"]
    assert lines[4][2:] == ["0.1600 ± 0.0849", "-0.3900 ± 0.0141"]
    assert len(lines) == 8
