"""What an acceptance run consists of."""

from dataclasses import dataclass

PACKAGE = __name__.rpartition(".")[0]
MODEL = ("diffusers", "einops", "omegaconf", "safetensors", "PIL")
TRAINING = (*MODEL, "accelerate", "torchdiffeq", "torchvision")


@dataclass(frozen=True)
class Stage:
    """One stage: a module with `run(bench)`, see `worker.Bench`, which runs in a process of its own.

    seconds: after which it is killed; soft ends come before, see `worker.SOFT`. rehearsal_seconds: the same of a
    rehearsal. needs: the modules without which it is not begun. interpreted: in a rehearsal Triton's kernels are
    interpreted.
    """

    number: int
    name: str
    about: str
    module: str
    seconds: float
    rehearsal_seconds: float = 1800.0
    needs: tuple[str, ...] = ()
    interpreted: bool = False


def _stage(number: int, name: str, about: str, seconds: float, **more) -> Stage:
    return Stage(number, name, about, f"{PACKAGE}.{name}", seconds, **more)


# In the order in which they are run: five minutes give the evidence that matters most, 2, 4 and 5 after the short 1.
STAGES = (
    _stage(1, "machine", "what the machine is, and its ceilings", 60),
    _stage(2, "correct", "the operator and the layer against fp64", 90, needs=("triton",), interpreted=True),
    _stage(4, "layer", "one layer beside its linears and attention", 85, needs=("triton",)),
    _stage(5, "model", "SiT-ATConv-XL/2 against SiT-XL/2", 150, needs=MODEL),
    _stage(3, "operator", "the operator's backends, and a sweep of tiles", 420, needs=("triton",), interpreted=True),
    _stage(6, "sampling", "guided samples a second", 120, needs=(*MODEL, "torchdiffeq")),
    _stage(7, "training", "training images a second, on random latents", 240, needs=TRAINING),
    _stage(8, "tests", "the tests that need a GPU", 420, needs=(*TRAINING, "pytest", "yaml", "sklearn")),
    _stage(
        9, "digits", "digits from training to samples in bf16, resumed, and FSDP2", 300, needs=(*TRAINING, "sklearn")
    ),
)
