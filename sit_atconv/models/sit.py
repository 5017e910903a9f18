"""SiT: a flow-matching transformer over a latent grid, with attention, ATConv or both as token mixers."""

import inspect
import math
import reprlib
import sys
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import nn

from sit_atconv.flow.path import PATHS, PREDICTIONS
from sit_atconv.layers.atconv import ATConv
from sit_atconv.layers.attention import Attention
from sit_atconv.layers.blocks import FinalLayer, SiTATConvBlock, SiTBlock
from sit_atconv.layers.embedders import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_position_embedding
from sit_atconv.ops.forward_mode import checkpointed
from sit_atconv.runtime.compat.diffusers import Adapters, checkpoint_function, register_block
from sit_atconv.runtime.compat.torch import maybe_mark_dynamic, statically_known_true
from sit_atconv.runtime.errors import InputError, check_choice

TOKEN_MIXERS = ("attention", "atconv", "hybrid")
PATCH_SIZES = (1, 2, 4, 8)
# "ddpm": a converted DiT, which predicts noise at times 0 to 999, 999 being noise; our samplers do not follow it.
MODEL_PATHS = (*PATHS, "ddpm")
# Far beyond every model there is: a configuration that is damaged, or made to, takes no memory.
MOST = {
    "sample_size": 1 << 12, "in_channels": 1 << 14, "hidden_size": 1 << 16, "depth": 1000, "num_heads": 1 << 12,
    "num_classes": 1 << 20,
}  # fmt: skip
MOST_MLP_RATIO = 100
MOST_POSITIONS, MOST_WEIGHTS = 1 << 28, 10**11


def mixer_names(token_mixer: str | list[str], depth: int) -> list[str]:
    """The mixer of every block, "attention" or "atconv"; "hybrid" puts attention in the even blocks (0-based)."""
    if isinstance(token_mixer, str):
        check_choice("token_mixer", token_mixer, TOKEN_MIXERS)
        even_odd = ("attention", "atconv") if token_mixer == "hybrid" else (token_mixer, token_mixer)
        return [even_odd[index % 2] for index in range(depth)]
    if not isinstance(token_mixer, list | tuple):
        raise InputError(f"token_mixer={token_mixer!r}: give a name or a list with one name per block")
    if len(token_mixer) != depth:
        raise InputError(f"token_mixer lists {len(token_mixer)} blocks but depth={depth}; give one name per block")
    for name in token_mixer:
        check_choice("token_mixer", name, ("attention", "atconv"))
    return list(token_mixer)


class SiTTransformer2DModel(ModelMixin, ConfigMixin, Adapters, CacheMixin, AttentionMixin):
    """Velocity of a flow over latents: t = 0 is noise, t = 1 is data, v = d x_t / dt.

    A new model has torch's default weights, as diffusers' models have; `reset_parameters`, which `create_model` calls,
    draws the starting weights of SiT.

    sample_size: latent height and width, an int or (H, W); other sizes that the patch divides are accepted by
        `forward` too, since the mixers take any grid and the position embedding is a function of the position.
    token_mixer: "attention", "atconv", "hybrid" (even blocks attention, odd ATConv), or a list with a name per block.
    pos_embed: True, False or "auto" (the public rule: present exactly if a block has attention).
    class_dropout_prob: share of labels that training replaces by the null class; 0 means no null class.
    learn_sigma: the output layer has twice the channels and the second half is dropped (public checkpoints).
    pool, routing, inhibition, kernel_size, activation: see `ATConv`. num_heads, qk_norm: see `Attention`.
    path, prediction: what the output means, for whatever samples from the model: "velocity", "score" or "noise" on the
        "linear", "gvp" or "vp" path, or on "ddpm" (see MODEL_PATHS). They change nothing in `forward`.
    use_meanflow: the output is the average velocity between two times, see `flow.meanflow`; an embedding of their
        distance is added to that of t. It starts at zero, so that the output is that of the model without it.
    trained_guidance: the scale of guidance that a MeanFlow model's output has without any; 1 is none.
    Parameter names are those of the public checkpoints. Raises InputError (a ValueError) for values that do not fit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTBlock", "SiTATConvBlock"]  # noqa: RUF012 (diffusers' own type)
    _repeated_blocks = ["SiTBlock", "SiTATConvBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = (
        "x_embedder",
        "t_embedder",
        "r_embedder",
        "y_embedder",
        "norm",
        "adaLN_modulation",
        "pos_embed",
    )

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        token_mixer: str | list[str] = "attention",
        pos_embed: bool | str = "auto",
        pool: str = "raster",
        routing: str = "adaptive",
        inhibition: str = "learned",
        kernel_size: int = 3,
        activation: str = "gelu_tanh",
        qk_norm: bool = False,
        path: str = "linear",
        prediction: str = "velocity",
        use_meanflow: bool = False,
        trained_guidance: float = 1.0,
    ):
        super().__init__()
        sides = sample_size if isinstance(sample_size, list | tuple) else (sample_size, sample_size)
        if len(sides) != 2:
            raise InputError(f"sample_size={sample_size!r}: give a number, or height and width")
        sizes = {"in_channels": in_channels, "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}
        for name, value in (*(("sample_size", side) for side in sides), *sizes.items(), ("num_classes", num_classes)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST[name]:
                raise InputError(f"{name}={value!r:.40}: must be a whole number from 1 to {MOST[name]:,}")
        if not (isinstance(mlp_ratio, int | float) and 1 <= hidden_size * mlp_ratio <= hidden_size * MOST_MLP_RATIO):
            raise InputError(
                f"mlp_ratio={mlp_ratio!r:.40}: must be a number that leaves the MLP at least one unit, and at most "
                f"{MOST_MLP_RATIO}"
            )
        mixers = mixer_names(token_mixer, depth)
        check_choice("patch_size", patch_size, PATCH_SIZES)
        check_choice("pos_embed", pos_embed, ("auto", True, False))
        check_choice("path", path, MODEL_PATHS)
        check_choice("prediction", prediction, PREDICTIONS)
        check_choice("use_meanflow", use_meanflow, (True, False))
        if use_meanflow and (path not in PATHS or prediction != "velocity"):
            raise InputError(
                f"use_meanflow with path={path!r} and prediction={prediction!r}: average velocities are of "
                "prediction='velocity' on a flow's path; choose these, or leave use_meanflow out"
            )
        if not (isinstance(trained_guidance, int | float) and math.isfinite(trained_guidance) and trained_guidance > 0):
            raise InputError(f"trained_guidance={trained_guidance!r:.40}: give a positive number; 1 is none")
        if trained_guidance != 1 and not use_meanflow:
            raise InputError(f"trained_guidance={trained_guidance:g}: only a MeanFlow model has it; leave it out")
        if not (isinstance(class_dropout_prob, int | float) and 0 <= class_dropout_prob < 1):
            raise InputError(f"class_dropout_prob={reprlib.repr(class_dropout_prob)}: choose a share in [0, 1)")
        grid = self.grid
        present = "attention" in mixers if pos_embed == "auto" else bool(pos_embed)
        if present * grid[0] * grid[1] * hidden_size > MOST_POSITIONS:
            raise InputError(
                f"sample_size={sample_size} with hidden_size={hidden_size}: the position embedding would have over "
                f"{MOST_POSITIONS:,} numbers; lower one"
            )
        if depth * hidden_size**2 * (6 + 2 * mlp_ratio) > MOST_WEIGHTS:
            raise InputError(
                f"depth={depth}, hidden_size={hidden_size}, mlp_ratio={mlp_ratio}: these are over {MOST_WEIGHTS:,} "
                "weights; lower one"
            )
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        with torch.random.fork_rng(devices=[]):  # all other weights are drawn as those of the model without it
            self.r_embedder = TimestepEmbedder(hidden_size) if use_meanflow else None
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_class=class_dropout_prob > 0)
        self.register_buffer("pos_embed", sincos_position_embedding(grid, hidden_size) if present else None)

        atconv = {"kernel_size": kernel_size, "activation": activation, "pool": pool, "routing": routing}
        atconv["inhibition"] = inhibition
        if "atconv" not in mixers:
            self._refuse_idle_options("ATConv", **atconv)
        if "attention" not in mixers:
            self._refuse_idle_options("attention", qk_norm=qk_norm)

        def block(name: str) -> SiTBlock:
            if name == "attention":
                return SiTBlock(hidden_size, Attention(hidden_size, num_heads, qk_norm), mlp_ratio)
            return SiTATConvBlock(hidden_size, ATConv(hidden_size, **atconv), mlp_ratio)

        self.blocks = nn.ModuleList(block(name) for name in mixers)
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels * (2 if learn_sigma else 1))

    def __getattr__(self, name: str):
        # `pos_embed` is an option and, in the public checkpoints, a tensor: as an attribute it is the tensor.
        return nn.Module.__getattr__(self, name) if name == "pos_embed" else super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        """Where the model is, or is moved to by diffusers' hooks, which are loaded where there are any."""
        return super().device if "diffusers.hooks" in sys.modules else next(self.parameters()).device

    @property
    def null_label(self) -> int | None:
        """The label of the null class, or None for a model without one (class_dropout_prob = 0)."""
        return self.config.num_classes if self.config.class_dropout_prob > 0 else None

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents that the model was made for."""
        size = self.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the tokens of these latents."""
        return self._grid(*self.latent_size)

    def enable_parallelism(self, *args, **kwargs) -> None:
        """As diffusers' own. Raises InputError for a model with ATConv, whose layers need all tokens."""
        if any(isinstance(block, SiTATConvBlock) for block in self.blocks):
            raise InputError("a SiT with ATConv has no context or tensor parallelism: its layers need all tokens")
        super().enable_parallelism(*args, **kwargs)

    def reset_parameters(self) -> None:
        """Draw the starting weights of SiT: xavier-uniform linears, adaLN and output layer at zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("r_embedder"):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        modulations = [block.adaLN_modulation[1] for block in self.blocks] + [self.final_layer.adaLN_modulation[1]]
        zero = [*modulations, self.final_layer.linear]
        if self.r_embedder is not None:
            nn.init.normal_(self.r_embedder.mlp[0].weight, std=0.02)
            nn.init.zeros_(self.r_embedder.mlp[0].bias)
            zero.append(self.r_embedder.mlp[2])
        for linear in zero:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        return_dict: bool = True,
        timestep_r: torch.Tensor | float | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Velocity at (x_t, t, label).

        hidden_states: x_t (B, in_channels, H, W), H and W multiples of the patch size.
        timestep: t in [0, 1], a number, a 0-d tensor or (B,). class_labels: (B,) int64 in [0, num_classes], where
        num_classes is the null class of a model that has one. A CUDA device waits for none of these, unless the tensor
        (B,) of times or of labels lies elsewhere; in a CUDA graph all are tensors of the device.
        timestep_r: of a MeanFlow model alone, the time in [t, 1] that the average velocity leads to, as `timestep` is
        given; None is t itself, where the average velocity is the velocity.
        Returns `sample` = velocity (B, in_channels, H, W), or the average one. Raises ValueError when shapes do not fit
        the configuration, and for a `timestep_r` of another model.
        """
        batch, channels, height, width = hidden_states.shape
        if channels != self.config.in_channels:
            raise ValueError(f"hidden_states has {channels} channels; this model takes {self.config.in_channels}")
        grid = self._grid(height, width)
        if timestep_r is not None and self.r_embedder is None:
            raise ValueError("timestep_r is for a MeanFlow model (use_meanflow), and this is none; leave it out")
        t = _times(timestep, batch, hidden_states.device)

        # Under autocast the input is fp32 and the convolution's output is not: the residual stream keeps the input's.
        x = self.x_embedder(hidden_states).to(hidden_states.dtype)
        if self.pos_embed is not None:
            x = x + self._position_embedding(grid).to(x.dtype).unflatten(1, grid)
        c = self.t_embedder(t, x.dtype) + self.y_embedder(class_labels)
        if self.r_embedder is not None:
            r = t if timestep_r is None else _times(timestep_r, batch, hidden_states.device)
            c = c + self.r_embedder(r - t, x.dtype)
        # Compiled blocks: one graph for the model's own grid, and one for all the others.
        foreign_grid = not torch.compiler.is_compiling() and not self._is_own(grid)
        for block in self.blocks:
            if foreign_grid:
                maybe_mark_dynamic(x, (1, 2))
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = checkpointed(checkpoint_function(self), block, x, c)
            else:
                x = block(x, c)
        patches, p = self.final_layer(x, c), self.config.patch_size
        output = rearrange(patches, "b h w (p q c) -> b c (h p) (w q)", p=p, q=p)
        velocity = output[:, :channels]
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise InputError(f"a latent of {height} x {width} cannot be cut into patches of {patch}; choose multiples")
        return height // patch, width // patch

    def _is_own(self, grid: tuple[int, int]) -> bool:
        """Whether the model was made for that grid; False where a graph leaves the grid open, which this keeps so."""
        known = bool if torch.jit.is_tracing() else statically_known_true  # sizes are tensors for torch.jit.trace
        return all(known(a == b) for a, b in zip(grid, self.grid, strict=True))

    def _position_embedding(self, grid: tuple[int, int]) -> torch.Tensor:
        if self._is_own(grid):
            return self.pos_embed
        return sincos_position_embedding(grid, self.config.hidden_size, self.pos_embed.device, torch.float32)

    @staticmethod
    def _refuse_idle_options(mixer: str, **options) -> None:
        defaults = inspect.signature(SiTTransformer2DModel.__init__).parameters
        for name, value in options.items():
            if value != defaults[name].default:
                raise InputError(f"{name}={value!r} needs a block with {mixer}, and token_mixer has none; leave it out")


def _times(timestep: torch.Tensor | float, batch: int, device: torch.device) -> torch.Tensor:
    """t (B,) in fp32 on the device. A number, and a 0-d tensor of the CPU, is an argument of a kernel: no copy."""
    if not isinstance(timestep, torch.Tensor):
        return torch.full((batch,), timestep, dtype=torch.float32, device=device)
    if timestep.ndim == 0 and timestep.is_cpu and device.type != "cpu":
        return torch.zeros(batch, dtype=torch.float32, device=device) + timestep
    return timestep.to(device, torch.float32).expand(batch)


for block_class in (SiTBlock, SiTATConvBlock):
    register_block(block_class)

_SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
_NAMES = {"attention": "SiT-{}/{}", "atconv": "SiT-ATConv-{}/{}", "hybrid": "SiT-ATConv-{}/{}-Hybrid"}
PRESETS = {
    name.format(size, patch): {**shape, "patch_size": patch, "token_mixer": mixer}
    for mixer, name in _NAMES.items()
    for size, shape in _SIZES.items()
    for patch in (2, 4, 8)
}


def list_models() -> list[str]:
    """Names of the presets: S, B, L, XL with attention, ATConv or hybrid blocks and patch 2, 4, 8."""
    return list(PRESETS)


def options_of(name: str | None) -> dict[str, Any]:
    """All options of SiTTransformer2DModel: those of the preset `name` (None: of none) over the defaults.

    Raises InputError (a ValueError) for an unknown name, suggesting the nearest one.
    """
    if name is not None:
        check_choice("model", name, PRESETS)
    _, *parameters = inspect.signature(SiTTransformer2DModel.__init__).parameters.values()
    return {each.name: each.default for each in parameters} | PRESETS.get(name, {})


def create_model(
    name: str | None, sample_size: int | tuple[int, int] = 32, num_classes: int = 1000, **overrides
) -> SiTTransformer2DModel:
    """A new model with SiT's starting weights: the preset `name`, and any option of SiTTransformer2DModel over it.

    sample_size: latent size (image size / 8 for a Stable-Diffusion VAE). `name=None` takes all from the overrides.
    Raises InputError (a ValueError) for an unknown name or option, suggesting the nearest one.
    """
    options = options_of(name)
    for option in overrides:
        check_choice("model option", option, options)
    model = SiTTransformer2DModel(**{**options, "sample_size": sample_size, "num_classes": num_classes, **overrides})
    model.reset_parameters()
    return model
