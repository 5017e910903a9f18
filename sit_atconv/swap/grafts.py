"""How one kind of attention is replaced by one kind of layer: built, started, and compared on its inputs."""

from collections.abc import Collection

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
from sit_atconv.swap.layers import LayerOptions, SelfATConv


class Graft:
    """What `swap_attention` needs to know of an attention class; subclass it to swap one of your own.

    layer: what takes the attention's place, where `build` is not another.
    """

    joint = False  # whether text and image tokens attend together: swapped under joint="split" only
    layer: type[KernelGenerator]

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

    def approximated(self, layer: KernelGenerator, output) -> torch.Tensor:
        """What ATConv has a part in of an output of the attention or the layer: the error is measured on it."""
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
    if processors and type(attention.processor) not in processors:
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
        parts = child.named_children() if isinstance(child, nn.ModuleList | KernelGenerator) else [("", child)]
        maps |= {f"{name}.{key}".rstrip("."): part for key, part in parts if not isinstance(part, nn.Dropout)}
    foreign = {}
    for name, module in maps.items():
        while hasattr(module, "base_layer"):
            module = module.base_layer
        plain = type(module) in (nn.Linear, TapLinear) and type(module.weight) is nn.Parameter
        if "norm" not in name and not plain:
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
    attention: nn.Module, value: nn.Linear, out: nn.Module, x: torch.Tensor, args: tuple, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of x, and what the attention gives its output map in a call, both without the bias of the values."""
    with recorded({"out": out}) as seen:
        attention(*args, **kwargs)
    (mixed, *_), _, _ = seen["out"]
    found = value(x), mixed.detach()
    return found if value.bias is None else tuple(each - value.bias.to(each.dtype) for each in found)


def qkv_observed(attention: nn.Module, x: torch.Tensor, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """`observed` of an attention with one linear for queries, keys and values."""
    return observed(attention, value_of(attention.qkv), attention.proj, x, args, kwargs)


class SelfAttentionGraft(Graft):
    """diffusers' `Attention` over image tokens alone: DiT, PixArt and U-Nets (attn1), SD3's second attention."""

    processors = (AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)

    def refusal(self, attention: Attention) -> str | None:
        if reason := class_refusal(attention, Attention, "diffusers' ", self.processors):
            return reason
        for trait, present in {
            "attends to a context": attention.is_cross_attention,
            "attends jointly with text": attention.added_kv_proj_dim is not None,
            "normalises by group": attention.group_norm is not None,
            "normalises in space": attention.spatial_norm is not None,
            "has a residual connection of its own": attention.residual_connection,
            "rescales its output": attention.rescale_output_factor != 1,
            "is causal": attention.is_causal,
            "has fewer value heads": attention.inner_kv_dim != attention.inner_dim,
        }.items():
            if present:
                return f"{trait}: ATConv does not stand for that"
        return linear_refusal(attention, "to_q", "to_k", "to_v", "to_out.0")

    def build(self, attention: Attention, reference: GridReference, options: LayerOptions) -> SelfATConv:
        out, dropout = attention.to_out
        return SelfATConv(attention.to_v, out, reference, options, dropout.p)

    def copy(self, attention: Attention, layer: SelfATConv) -> None:
        take_over(attention.to_v, attention.to_out[0], layer.to_v, layer.to_out[0])

    def observe(self, attention, layer, args, kwargs):
        x = argument("hidden_states", args, kwargs)
        return observed(attention, attention.to_v, attention.to_out[0], x, args, kwargs)


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


def value_of(qkv: nn.Linear) -> nn.Linear:
    """The value map within one linear for queries, keys and values."""
    value = nn.Linear(qkv.in_features, qkv.out_features // 3, bias=qkv.bias is not None, device="meta")
    value.weight = nn.Parameter(qkv.weight.data.chunk(3)[2])
    if qkv.bias is not None:
        value.bias = nn.Parameter(qkv.bias.data.chunk(3)[2])
    return value
