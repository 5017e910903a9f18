"""A training step on CUDA waits for nothing: the trainer's own, on a device that computes nothing."""

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import reset_accelerate, slowly
from no_synchronisation import FakeCuda, Synchronisation, fake_cuda

from sit_atconv import create_model
from sit_atconv.classification.objective import ClassificationObjective
from sit_atconv.classification.plan import facts_of
from sit_atconv.classification.recipe import ClassifierRecipe
from sit_atconv.config import load_recipe
from sit_atconv.data.digits import Digits
from sit_atconv.latents.codecs import IdentityCodec
from sit_atconv.training.facts import Facts
from sit_atconv.training.log import Means
from sit_atconv.training.objectives import objective_of
from sit_atconv.training.objectives.distill import DistillObjective
from sit_atconv.training.objectives.flow import FlowObjective
from sit_atconv.training.objectives.repa import RepaObjective
from sit_atconv.training.trainer import Trainer
from sit_atconv.training.verdict import AtOnce, Late


class OnCuda(Accelerator):
    """Accelerate on one process with a GPU, but for what it asks of the machine."""

    device = torch.device("cuda:0")


def on(objective, recipe) -> Trainer:
    """A trainer of the objective as `Trainer` leaves it on CUDA, before its first step."""
    reset_accelerate()
    accelerator = OnCuda(cpu=True, gradient_accumulation_steps=recipe.train.gradient_accumulation_steps)
    trainer = Trainer.__new__(Trainer)
    trainer.accelerator, trainer.recipe, trainer.objective = accelerator, recipe, objective
    trainer.step = trainer.skipped = trainer.skipped_in_a_row = trainer.images_here = 0
    trainer.pending, trainer.verdict_on = None, Late
    optimizer = objective.make_optimizer(fused=True)
    trainer.network, trainer.optimizer = accelerator.prepare(
        objective.trained, optimizer, device_placement=[False, False]
    )
    trainer.means = Means([*objective.weights], accelerator.device, objective.time_bins)
    return trainer


def begun(recipe, facts: Facts):
    """The objective of a recipe for a SiT, before its first step."""
    objective = objective_of(recipe)(recipe, facts)
    objective.open(IdentityCodec())
    objective.begin(None, None)
    return objective


def moved(cuda: FakeCuda, objective):
    """The objective, with all its modules on the device."""
    whole = objective.trained is objective.model
    objective.trained = cuda.moved(objective.trained)
    objective.model = objective.trained if whole else objective.trained.model
    objective.codec = cuda.moved(objective.codec)
    if isinstance(objective, RepaObjective):
        objective.encoder = cuda.moved(objective.encoder)
    if isinstance(objective, DistillObjective):
        objective.teacher = cuda.moved(objective.teacher)
        objective.trained._teacher = (objective.teacher,)
    averages = objective.averages
    averages.models = {name: cuda.moved(model) for name, model in averages.models.items()}
    return objective


def batch_of(*shape: int, classes: int) -> dict[str, torch.Tensor]:
    """A micro-batch as the loader gives it."""
    labels = torch.arange(shape[0]) % classes
    made = {"image": torch.rand(shape), "noise": torch.randn(shape), "t": torch.rand(shape[0]), "label": labels}
    return {key: value.pin_memory() for key, value in made.items()}


def steps_of(cuda: FakeCuda, trainer: Trainer, number: int, batch: dict[str, torch.Tensor]) -> None:
    """Steps without a report, in each of which the one before is settled: nothing newer may be waited for."""
    updates, update = [], trainer.objective.averages.update
    trainer.objective.averages.update = lambda model, number: updates.append(number) or update(model, number)
    for step in range(number):
        with cuda.no_synchronisation():
            trainer._optimize([batch] * trainer.recipe.train.gradient_accumulation_steps, False)
        assert updates == list(range(1, step + 1))
    with cuda.no_synchronisation():  # what a report adds
        trainer._squares()
    trainer.settle()
    assert updates == list(range(1, number + 1))


WEIGHED = {"path": "vp", "prediction": "noise", "loss_weight": "likelihood"}


@pytest.mark.parametrize(
    ("clip", "flow"), [(None, {}), *slowly([(1.0, WEIGHED), (None, {"path": "vp"})])], ids=["plain", "weighed", "vp"]
)
def test_steps_of_the_flow_wait_for_nothing(recipe_file, clip, flow):
    train = {"gradient_accumulation_steps": 2, "max_grad_norm": clip}
    recipe = load_recipe(recipe_file(train=train, flow=flow, ema={"kind": "power", "decay": None}))
    objective = begun(recipe, Facts((1, 8, 8), 10, 1437))
    with fake_cuda() as cuda:
        trainer = on(moved(cuda, objective), recipe)
        steps_of(cuda, trainer, 2, batch_of(4, 1, 8, 8, classes=10))


def test_steps_of_average_velocities_wait_for_nothing(recipe_file, monkeypatch):
    """But for the product with the Jacobian: the pretended device knows no torch.func."""
    monkeypatch.setattr(
        "sit_atconv.training.objectives.meanflow.change", lambda average, x, t, s, v: average(x, t, s) + v
    )
    meanflow = {"share": 0.5, "omega": 1.2, "kappa": 0.3, "tangent": "network"}
    recipe = load_recipe(recipe_file(meanflow=meanflow))
    objective = begun(recipe, Facts((1, 8, 8), 10, 1437))
    with fake_cuda() as cuda:
        batch = batch_of(4, 1, 8, 8, classes=10)
        more = {"s": batch["t"] + torch.tensor([0, 0.1, 0, 0.1]), "apart": torch.tensor([1, 3])}
        batch |= {key: value.pin_memory() for key, value in more.items()}
        steps_of(cuda, on(moved(cuda, objective), recipe), 2, batch)


@pytest.mark.slow
def test_steps_with_repa_wait_for_nothing(recipe_file, image_folder, encoder_folder):
    data = {"kind": "imagefolder", "root": str(image_folder), "image_size": 8}
    repa = {"encoder": f"local-dir:{encoder_folder}", "depth": 1, "projector_dim": 12}
    recipe = load_recipe(recipe_file(data=data, repa=repa))
    objective = begun(recipe, Facts((3, 8, 8), 3, 12))
    with fake_cuda() as cuda:
        trainer = on(moved(cuda, objective), recipe)
        steps_of(cuda, trainer, 2, batch_of(4, 3, 8, 8, classes=3))


@pytest.mark.slow
def test_steps_of_a_distillation_wait_for_nothing(recipe_file, tmp_path, monkeypatch):
    """One that trains layers alone, and those that run with some of them and with all."""
    create_model(
        None, 8, 10, patch_size=2, hidden_size=16, depth=2, num_heads=2, in_channels=1, learn_sigma=False,
        token_mixer="attention",
    ).save_pretrained(tmp_path / "teacher")  # fmt: skip
    settings = {"teacher": str(tmp_path / "teacher"), "blockwise_steps": 1, "share_steps": 1, "shares": [0.5, 1.0]}
    path = recipe_file(distill=settings)
    path.write_text(yaml.safe_dump({key: it for key, it in yaml.safe_load(path.read_text()).items() if key != "model"}))
    monkeypatch.setattr(DistillObjective, "_start", lambda self, samples: None)
    recipe = load_recipe(path)
    objective = begun(recipe, Facts((1, 8, 8), 10, 1437))
    with fake_cuda() as cuda:
        trainer = on(moved(cuda, objective), recipe)
        steps_of(cuda, trainer, 4, batch_of(4, 1, 8, 8, classes=10))


@pytest.mark.slow
def test_steps_of_a_classifier_wait_for_nothing(tmp_path):
    tiny = {"depths": [1, 1], "dims": [8, 12], "mlp_ratios": [1, 1], "stem_strides": [2, 2]}
    sections = {
        "run": {"out": str(tmp_path / "run")},
        "data": {"kind": "digits"},
        "model": {"name": "attnet_xxs", "input_size": 16, "options": tiny},
        "train": {"batch_size": 8},
        "augment": {"mixup": 0.3, "cutmix": 0.7},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    recipe = load_recipe(tmp_path / "recipe.yaml", (), ClassifierRecipe)
    digits = Digits("train")
    objective = ClassificationObjective(recipe, facts_of(recipe, digits, digits))
    objective.begin(None, None)
    with fake_cuda() as cuda:
        objective.model = objective.trained = cuda.moved(objective.model)
        average = objective.averages
        average.ema.module = cuda.moved(average.ema.module)
        average.models = {"ema": average.ema.module}
        batch = batch_of(4, 1, 16, 16, classes=10)
        steps_of(cuda, on(objective, recipe), 3, {key: batch[key] for key in ("image", "label")})


@pytest.mark.parametrize("planted", ["verdict", *slowly(["losses", "batch"])])
def test_a_step_that_waits_is_found(recipe_file, planted, monkeypatch):
    recipe = load_recipe(recipe_file())
    losses = FlowObjective.losses
    objective = begun(recipe, Facts((1, 8, 8), 10, 1437))
    with fake_cuda() as cuda:
        trainer = on(moved(cuda, objective), recipe)
        batch = batch_of(4, 1, 8, 8, classes=10)
        if planted == "losses":
            monkeypatch.setattr(
                FlowObjective, "losses", lambda *given: [loss / loss.max().item() for loss in losses(*given)]
            )
        elif planted == "verdict":
            trainer.verdict_on = AtOnce
        else:
            batch["t"] = batch["t"].clone()  # not pinned
        with pytest.raises(Synchronisation):
            steps_of(cuda, trainer, 1, batch)
