"""What the drill is made on: the trainers, each with a tiny recipe that has all that is random switched on."""

from dataclasses import dataclass, replace
from typing import Any

STEPS = 60
CHECKPOINT = {"every": 4, "keep_last": 2, "keep_every": 20}
LETTERS = {"step": b"s", "preview": b"p", "snapshot": b"e", "evaluation": b"v", "checkpoint": b"c", "score": b"f"}

STEP, ACTIVITIES = "sit_atconv.training.trainer:Trainer._optimize", "sit_atconv.training.activities"


@dataclass(frozen=True)
class Subject:
    """A trainer, and what differs from the other one in a drill."""

    name: str
    script: str  # of the command
    objective: str  # module:class of what it minimises
    recipe: dict[str, Any]  # but for run
    phases: dict[str, str]  # the method that is a phase, module:class.method; a checkpoint is written by neither
    killed_in: tuple[str, ...]  # phases, in turn
    weights: str  # file of a model in a checkpoint
    timeless: tuple[str, ...]  # of a log's row: what does not depend on the clock or the machine
    bare: tuple[str, ...]  # overrides: one average, and nothing on the disk but logs and the newest checkpoint
    splits: bool  # whether two processes take the steps that one takes, to rounding
    faults: bool = True  # whether it meets other faults than SIGKILL, too; else those of its command are another's
    source: dict[str, Any] | None = None  # recipe, but for run, of what its weights begin from, see train.init


SIT = Subject(
    name="sit",
    script="train_sit.py",
    objective="sit_atconv.training.objectives.flow:FlowObjective",
    recipe={
        "model": {
            "patch_size": 2, "hidden_size": 48, "depth": 2, "num_heads": 2, "learn_sigma": False,
            "token_mixer": "hybrid",
        },
        "data": {"flip": True},
        "train": {"max_steps": STEPS, "batch_size": 16, "lr": 1e-3, "max_grad_norm": 1.0},
        "ema": {"kind": "power", "snapshot_every": 7},
        "checkpoint": CHECKPOINT,
        "preview": {"every": 5, "num": 10, "steps": 4},
    },
    phases={"step": STEP, "preview": f"{ACTIVITIES}:Previews.take", "snapshot": f"{ACTIVITIES}:Snapshots.take"},
    killed_in=("step", "checkpoint", "preview", "checkpoint", "step", "snapshot"),
    weights="diffusion_pytorch_model.safetensors",
    timeless=(
        "step", "images_seen", "loss", "loss_by_time", "grad_norm", "lr", "update_ratio", "skipped", "bad_images",
    ),
    bare=(
        "preview.every=0", "checkpoint.keep_last=1", "ema.snapshot_every=null", "checkpoint.keep_every=null",
        "ema.kind=constant",
    ),
    splits=True,
)  # fmt: skip
SCORES = replace(
    SIT,
    name="scores",
    recipe={**SIT.recipe, "preview": {"every": 0, "steps": 2}, "score": {"every": 6, "num": 40}},
    phases={"step": STEP, "score": f"{ACTIVITIES}:Scores.take"},
    killed_in=("score", "checkpoint", "step"),
    faults=False,
)
INIT = replace(
    SIT,
    name="init",
    faults=False,
    source={**SIT.recipe, "train": {**SIT.recipe["train"], "max_steps": 4}, "run": {"seed": 1}},
)
MIXER = replace(
    INIT,
    name="mixer",
    recipe={**SIT.recipe, "train": {**SIT.recipe["train"], "init_anew": ["blocks.1.attn"]}},
    source={**INIT.source, "model": {**SIT.recipe["model"], "token_mixer": "attention"}},
)
LORA = replace(
    MIXER, name="lora", recipe={**MIXER.recipe, "lora": {"rank": 4}}, weights="pytorch_lora_weights.safetensors"
)
MEANFLOW = replace(
    SIT,
    name="meanflow",
    faults=False,
    recipe={**SIT.recipe, "meanflow": {"share": 0.5, "omega": 1.2, "kappa": 0.3}},
    timeless=(*SIT.timeless, "weighted_loss"),
)
ATTNET = Subject(
    name="attnet",
    script="train_attnet.py",
    objective="sit_atconv.classification.objective:ClassificationObjective",
    recipe={
        "data": {"repeats": 3},
        "augment": {"scale": [0.5, 1.0], "hflip": 0.5, "erasing": 0.5, "mixup": 0.4, "cutmix": 1.0},
        "model": {
            "name": "attnet_xxs", "input_size": 16, "drop_path_rate": 0.3, "drop_rate": 0.1,
            "options": {"depths": [1, 1], "dims": [8, 12], "mlp_ratios": [2, 2], "stem_strides": [2, 1]},
        },
        # Of 1,437 digits, seen in part; the deleted images are fewer, and seen in many epochs.
        "train": {
            "epochs": STEPS * 16 / 1437, "warmup_epochs": 0.1, "batch_size": 16, "lr": 1e-3, "max_grad_norm": 1.0,
            "gradient_accumulation_steps": 2,
        },
        "ema": {"decay": 0.9, "warmup": True},
        "eval": {"every_epochs": 7 * 16 / 1437},
        "checkpoint": CHECKPOINT,
    },
    phases={"step": STEP, "evaluation": "sit_atconv.classification.evaluation:Evaluation.evaluate"},
    killed_in=("step", "checkpoint", "evaluation", "checkpoint", "step", "evaluation"),
    weights="model.safetensors",
    timeless=("step", "images_seen", "loss", "grad_norm", "lr", "update_ratio", "skipped", "bad_images"),
    bare=("checkpoint.keep_last=1", "checkpoint.keep_every=null"),
    splits=False,  # each process has batch statistics of its own
)  # fmt: skip
SUBJECTS = {each.name: each for each in (SIT, SCORES, INIT, MIXER, LORA, MEANFLOW, ATTNET)}
