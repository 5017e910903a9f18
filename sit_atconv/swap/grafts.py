"""How one kind of attention is replaced by one kind of layer: built, started, and compared on its inputs."""

from collections.abc import Collection, Sequence

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

import sit_atconv.layers.attention as sit_attention
from sit_atconv.layers.atconv import ATConv, KernelGenerator, TapLinear
from sit_atconv.runtime.compat.diffusers import diffusers_hooks
from sit_atconv.runtime.hooks import recorded
from sit_atconv.swap.grid import GridReference, argument
from sit_atconv.swap.layers import LayerOptions, SelfATConv, refuse


class Graft:
    """What `swap_attention` needs to know of an attention class; subclass it to swap one of your own.

    layer: what takes the attention's place, where `build` is not another.
    cls: of the attention. processors: of diffusers, those that do the work; none: the class itself does it. Both can be
    given to an instance too, for another class with the same parts.
    """

    joint = False  # whether text and image tokens attend together: swapped under joint="split" only
    layer: type[KernelGenerator]
    only: tuple[type[nn.Module], ...] = ()  # the classes that it is for, where the names of its sites are others' too
    cls: type[nn.Module] | None = None
    processors: tuple[type, ...] = ()

    def __init__(self, cls: type[nn.Module] | None = None, *processors: type):
        if cls is not None:
            self.cls, self.processors = cls, processors

    def refusal(self, attention: nn.Module) -> str | None:
        """Why this attention cannot be swapped, in words that complete "NAME ..."; None where it can."""
        raise NotImplementedError

    def build(self, attention: nn.Module, reference: GridReference, options: LayerOptions) -> KernelGenerator:
        """A layer of the attention's sizes that takes its place, freshly started."""
        return self.layer(attention, reference, options)

    def heads(self, attention: nn.Module) -> int:
        """How many groups of channels get taps of their own."""
        return attention.heads if hasattr(attention, "heads") else attention.num_heads

    def copy(self, attention: nn.Module, layer: KernelGenerator) -> None:
        """Give the layer the attention's value and output maps, and whatever else it keeps of it."""
        raise NotImplementedError

    def observe(
        self, attention: nn.Module, layer: KernelGenerator, args: tuple, kwargs: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For a call of the attention: values (B, N, channels), and what their convolution should come to.

        Called after `copy` (and `settle`), without gradients; both are image tokens on the layer's grid, before the
        output map.
        """
        raise NotImplementedError

    def text_share(self, attention: nn.Module, layer: KernelGenerator, args: tuple, kwargs: dict) -> torch.Tensor:
        """For a call of a joint attention: the mean softmax mass of image queries on text keys, (heads,)."""
        raise NotImplementedError

    def settle(self, layer: KernelGenerator, share: torch.Tensor) -> None:
        """Start a joint layer from the mean of `text_share` over the calibration inputs."""
        raise NotImplementedError

    def approximated(self, layer: KernelGenerator, output, args: tuple, kwargs: dict) -> torch.Tensor:
        """What ATConv has a part in of an output of the attention or the layer: the error is measured on it. args,
        kwargs: of the call that gave it."""
        return output

    def grid(self, layer: KernelGenerator, args: tuple, kwargs: dict) -> tuple[int, ...]:
        """The grid of a call of the attention, (H, W) or (T, H, W)."""
        return layer.reference.get()


def is_fused(module: nn.Module) -> bool:
    """Whether an attention computes queries, keys and values as one; of `Attention`, whose mark unfusing leaves, its
    processor tells."""
    old = isinstance(module, Attention) and not type(module.processor).__name__.startswith("Fused")
    return getattr(module, "fused_projections", False) and not old


def kind_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def class_refusal(
    attention: nn.Module, wanted: type[nn.Module], of: str = "", processors: Collection[type] = ()
) -> str | None:
    """Why an attention cannot be swapped as one of the class `wanted`, which is said to be of `of`, run by one of the
    processors, if any are given."""
    if type(attention) is not wanted:
        return f"is a {kind_of(attention)}, not {of}{wanted.__name__}; register a Graft for it"
    if processors and hasattr(attention, "processor") and type(attention.processor) not in processors:
        return f"runs {type(attention.processor).__name__}, whose work ATConv would not do; reset the processor"
    return None


def linear_refusal(attention: nn.Module, *names: str) -> str | None:
    """Why the maps of that name cannot be taken over: an adapter, a quantisation, or a sharded weight is on them."""
    for name in names:
        linear = attention.get_submodule(name)
        if type(linear) is not nn.Linear:
            return (
                f"has {name} of type {kind_of(linear)}, not torch's Linear; swap before adapters and quantisation "
                "(unload a LoRA first, fused or not: fusing alone keeps its modules)"
            )
        if type(linear.weight) is not nn.Parameter:
            return f"has {name} with weights of type {type(linear.weight).__name__}; swap before sharding or quantising"
        if linear.weight.dtype.itemsize < 2:
            return f"has {name} with weights in {linear.weight.dtype}; swap before casting layerwise"
        if hooks := diffusers_hooks(linear):
            return f"has {name} under diffusers' hook {next(iter(hooks))!r}; swap before that"
    return None


def foreign_maps(layer: KernelGenerator) -> dict[str, nn.Module]:
    """What others have put in the place of a layer's linear maps, or quantised, by name; of an adapter, what is below.

    An adapter upon a map that is its plain self is none of these.
    """
    maps = {}
    for name, child in layer.named_children():
        if name in getattr(layer, "kept", ()):  # what a layer keeps of its attention beside linear maps
            continue
        parts = child.named_children() if isinstance(child, nn.ModuleList | KernelGenerator) else [("", child)]
        maps |= {f"{name}.{key}".rstrip("."): part for key, part in parts if not isinstance(part, nn.Dropout)}
    foreign, norms = {}, getattr(getattr(layer, "graft", None), "norms", ())
    for name, module in maps.items():
        while hasattr(module, "base_layer"):
            module = module.base_layer
        plain = type(module) in (nn.Linear, TapLinear) and type(module.weight) is nn.Parameter
        if "norm" not in name and name not in norms and not plain:
            foreign[name] = module
    return foreign


def take_over(attention_value: nn.Linear, attention_out: nn.Linear, value: nn.Linear, out: nn.Linear) -> None:
    """Copy value and output maps, the value's bias folded into the output's: exact, since softmax rows sum to one."""
    value.weight.data.copy_(attention_value.weight)
    out.weight.data.copy_(attention_out.weight)
    bias = torch.zeros_like(attention_out.weight[:, 0])
    if attention_out.bias is not None:
        bias = bias + attention_out.bias.data
    if attention_value.bias is not None:
        bias = bias + attention_out.weight.data @ attention_value.bias.data
        value.bias.data.zero_()
    if out.bias is not None:
        out.bias.data.copy_(bias)


def observed(
    attention: nn.Module,
    value: nn.Linear,
    out: nn.Module,
    x: torch.Tensor,
    args: tuple,
    kwargs: dict,
    channels: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of x, and what the attention gives its output map in a call, both without the bias of the values.

    channels: how many of the output map's are the attention's; None: as many as those of the values, and the rest is of
    an MLP with the same output map.
    """
    with recorded({"out": out}) as seen:
        attention(*args, **kwargs)
    (mixed, *_), _, _ = seen["out"]
    found = value(x), mixed.detach()[..., : channels or value.out_features]
    return found if value.bias is None else tuple(each - value.bias.to(each.dtype) for each in found)


def qkv_observed(attention: nn.Module, x: torch.Tensor, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """`observed` of an attention with one linear for queries, keys and values."""
    return observed(attention, value_of(attention.qkv), attention.proj, x, args, kwargs)


class CalledSelfATConv(SelfATConv):
    """`SelfATConv` that is called as the attention of another class, whose `graft` tells the tokens."""

    def __init__(self, graft: "SelfAttentionGraft", *args):
        super().__init__(*args)
        self.graft = graft

    def forward(self, *args, **kwargs) -> torch.Tensor:
        self.warn_of(kwargs)
        return self.output(self.graft.tokens(*args, **kwargs))


class SelfAttentionGraft(Graft):
    """An attention over image or video tokens alone: diffusers' `Attention` in DiT, PixArt and U-Nets (attn1), SD3's
    second one.

    For a class of one's own a subclass tells `cls`, its maps, and, where its tokens are not its first argument or
    `hidden_states`, `tokens`:

    value, out: the names of its maps; out is a linear or a list with one first.
    """

    cls: type[nn.Module] = Attention
    processors = (AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
    value: str = "to_v"
    out: str = "to_out"

    def tokens(
        self, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, *_, **__
    ) -> torch.Tensor:
        """The tokens (B, N, dim) of a call of the attention; the arguments are the attention's own, by position too."""
        refuse(encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask)
        return hidden_states

    def maps(self, attention: nn.Module) -> tuple[nn.Linear, nn.Linear]:
        """The value's and the output's."""
        out = getattr(attention, self.out)
        return getattr(attention, self.value), out[0] if isinstance(out, nn.ModuleList) else out

    def refusal(self, attention: nn.Module) -> str | None:
        own = "diffusers' " if self.cls is Attention else ""
        if reason := class_refusal(attention, self.cls, own, self.processors):
            return reason
        if is_fused(attention):
            return "has fused projections; call unfuse_qkv_projections first"
        for trait, present in self.traits(attention).items() if self.cls is Attention else ():
            if present:
                return f"{trait}: ATConv does not stand for that"
        out = f"{self.out}.0" if isinstance(getattr(attention, self.out), nn.ModuleList) else self.out
        asked = [name for name in ("to_q", "to_k") if hasattr(attention, name)]
        return linear_refusal(attention, *asked, self.value, out)

    def traits(self, attention: Attention) -> dict[str, bool]:
        """What ATConv does not stand for, and whether the attention has it."""
        return {
            "attends to a context": attention.is_cross_attention,
            "attends jointly with text": attention.added_kv_proj_dim is not None,
            "normalises by group": attention.group_norm is not None,
            "normalises in space": attention.spatial_norm is not None,
            "has a residual connection of its own": attention.residual_connection,
            "rescales its output": attention.rescale_output_factor != 1,
            "is causal": attention.is_causal,
            "has fewer value heads": attention.inner_kv_dim != attention.inner_dim,
        }

    def build(self, attention: nn.Module, reference: GridReference, options: LayerOptions) -> SelfATConv:
        out = getattr(attention, self.out)
        dropout = out[1].p if isinstance(out, nn.ModuleList) and len(out) > 1 else 0.0
        arguments = (*self.maps(attention), reference, options, dropout)
        return SelfATConv(*arguments) if self.cls is Attention else CalledSelfATConv(self, *arguments)

    def copy(self, attention: nn.Module, layer: SelfATConv) -> None:
        take_over(*self.maps(attention), layer.to_v, layer.to_out[0])

    def observe(self, attention, layer, args, kwargs):
        value, out = self.maps(attention)
        return observed(attention, value, out, self.tokens(*args, **kwargs), args, kwargs)


class SiTAttentionGraft(Graft):
    """The attention of our own SiT, for our own ATConv: a model with both is a hybrid like any other."""

    def refusal(self, attention: nn.Module) -> str | None:
        processors = (sit_attention.SiTAttnProcessor,)
        unknown = class_refusal(attention, sit_attention.Attention, "SiT's ", processors)
        return unknown or linear_refusal(attention, "qkv", "proj")

    def build(self, attention, reference: GridReference, options: LayerOptions) -> ATConv:
        layer = ATConv(attention.proj.in_features, options.kernel_size, pool=options.pool)
        return layer.to(attention.proj.weight.device, attention.proj.weight.dtype)

    def copy(self, attention, layer: ATConv) -> None:
        take_over(value_of(attention.qkv), attention.proj, layer.x_proj, layer.proj)

    def observe(self, attention, layer, args, kwargs):
        return qkv_observed(attention, argument("x", args, kwargs).flatten(1, 2), args, kwargs)

    def grid(self, layer, args, kwargs) -> tuple[int, int]:
        return tuple(argument("x", args, kwargs).shape[1:3])


def part_of(fused: nn.Linear, index: int, biases: Sequence[torch.Tensor | None] | None = None) -> nn.Linear:
    """Of one linear for queries, keys and values, that of the index, with the weights of it.

    biases: of the three, where they are not the linear's own.
    """
    if biases is None:
        biases = (None,) * 3 if fused.bias is None else fused.bias.data.chunk(3)
    return as_linear(fused.weight.data.chunk(3)[index], biases[index])


def as_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear of that weight (out, in) and bias (out,), which are not copied."""
    linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.data)
    if bias is not None:
        linear.bias = nn.Parameter(bias.data)
    return linear


def value_of(qkv: nn.Linear) -> nn.Linear:
    """The value map within one linear for queries, keys and values."""
    return part_of(qkv, 2)
