"""REPA's projectors: hidden tokens of a model -> features of frozen image encoders."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from sit_atconv.runtime.errors import InputError, named, told
from sit_atconv.runtime.hooks import recorded
from sit_atconv.runtime.reading import read_tensors

FILE = "projectors.safetensors"


class Projectors(nn.Module):
    """z_i = Linear SiLU Linear SiLU Linear of the tokens that leave block number `encoder_depth` (1-based).

    dim: width of the model. hidden_dim: width inside. z_dims: width of each encoder's features.
    Raises InputError for an encoder depth below 1.
    """

    def __init__(self, dim: int, hidden_dim: int, z_dims: list[int], encoder_depth: int):
        super().__init__()
        if encoder_depth < 1:
            raise InputError(f"encoder depth {encoder_depth}: blocks are counted from 1")
        self.encoder_depth = encoder_depth
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU(),
                nn.Linear(hidden_dim, z_dim),
            )
            for z_dim in z_dims
        )  # fmt: skip

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor], encoder_depth: int) -> "Projectors":
        """Projectors of the sizes that the public tensors projectors.i.{0,2,4}.{weight,bias} have.

        Raises InputError when one is missing, unexpected or of another shape.
        """
        kinds = (LookupError, ValueError, RuntimeError)
        with told("the projectors are not three linears for each encoder", *kinds, in_full=True):
            count = len({name.split(".")[1] for name in state})
            hidden_dim, dim = state["projectors.0.0.weight"].shape
            z_dims = [state[f"projectors.{index}.4.weight"].shape[0] for index in range(count)]
            projectors = cls(dim, hidden_dim, z_dims, encoder_depth)
            projectors.load_state_dict(state, strict=True, assign=True)
        return projectors

    @property
    def z_dims(self) -> list[int]:
        """Width of each encoder's features."""
        return [projector[4].out_features for projector in self.projectors]

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """tokens (B, N, dim) -> one z (B, N, z_dim) per encoder."""
        return [projector(tokens) for projector in self.projectors]

    def with_model(
        self, model: nn.Module, x: torch.Tensor, t: torch.Tensor | float, labels: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(velocity, z of every encoder) in one pass of a SiTTransformer2DModel at (x, t, labels).

        Gradients of z reach the model. Raises InputError for a model with fewer blocks than the encoder depth.
        """
        if self.encoder_depth > len(model.blocks):
            raise InputError(f"encoder depth {self.encoder_depth}: the model has {len(model.blocks)} blocks")
        # Closed before a backward pass, in which gradient checkpointing calls the block again. A compiled block calls
        # its hooks outside of its graph.
        with recorded({"block": model.blocks[self.encoder_depth - 1]}) as seen:
            velocity = model(x, t, labels).sample
        return velocity, self(seen["block"][2].flatten(1, 2))

    def save(self, folder: Path) -> None:
        """Write `folder`/projectors.safetensors, under the public names: equal bytes for equal tensors."""
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        # A single key: safetensors writes several in an order that changes from process to process.
        save_file(state, folder / FILE, metadata={"encoder_depth": str(self.encoder_depth)})

    @classmethod
    def load(cls, folder: str | Path) -> "Projectors":
        """What `save` wrote. Raises InputError when the folder has none, or a damaged one."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise InputError(f"{str(folder)!r} holds no {FILE}; convert a REPA checkpoint and keep its projectors")
        state, metadata = read_tensors(path, "file of projectors")
        with told(f"file of projectors {str(path)!r} is cut or damaged", KeyError, ValueError):
            depth = int(metadata["encoder_depth"])
        with named(f"file of projectors {str(path)!r}"):
            return cls.from_state_dict(state, depth)


def write_projectors(projectors: Projectors, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write projectors, whose own tensors may be sharded, as `Projectors.load` reads them. tensors: the full ones."""
    Projectors.from_state_dict(tensors, projectors.encoder_depth).save(folder)
