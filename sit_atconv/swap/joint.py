"""Joint attention over text and image, split: exact for the text, ATConv and a share of the text for the image."""

import copy
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import nn

from sit_atconv.layers.attention import attend
from sit_atconv.layers.norm import norm
from sit_atconv.ops.atconv import on_grid
from sit_atconv.runtime.compat.diffusers import attention_backend
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.grafts import Graft, class_refusal, is_fused, linear_refusal
from sit_atconv.swap.grid import GridReference, argument
from sit_atconv.swap.layers import LayerOptions, SwappedLayer, refuse

IMAGE_MAPS = ("to_q", "to_k", "to_v")
TEXT_MAPS = ("add_q_proj", "add_k_proj", "add_v_proj")
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


class Heads(NamedTuple):
    """Queries, keys and values of one kind of token, each (B, tokens, heads, head_dim); None where nothing asks."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor


def project_streams(
    module: nn.Module, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_
) -> tuple[Heads, Heads]:
    """Text and image as `module` sees them, an attention with maps of its own for text, or the layer for it."""
    if encoder_hidden_states is None:
        raise InputError("a joint attention was called without encoder_hidden_states; the split needs the text tokens")

    def heads(linear: nn.Linear | None, normalise: nn.Module | None, tokens, tables=None):
        if linear is None:
            return None
        made = linear(tokens).unflatten(-1, (module.heads, -1))
        made = made if normalise is None else norm(normalise, made)
        return made if tables is None else apply_rotary_emb(made, tables, sequence_dim=1)

    length = encoder_hidden_states.shape[1]
    of_text = of_image = None
    if image_rotary_emb is not None:
        of_text, of_image = zip(*((table[:length], table[length:]) for table in image_rotary_emb), strict=True)
    text = Heads(
        heads(module.add_q_proj, module.norm_added_q, encoder_hidden_states, of_text),
        heads(module.add_k_proj, module.norm_added_k, encoder_hidden_states, of_text),
        heads(module.add_v_proj, None, encoder_hidden_states),
    )
    image = Heads(
        heads(module.to_q, module.norm_q, hidden_states, of_image),
        heads(module.to_k, module.norm_k, hidden_states, of_image),
        heads(module.to_v, None, hidden_states),
    )
    return text, image


def project_sequence(module: nn.Module, length: int, hidden_states, image_rotary_emb=None) -> tuple[Heads, Heads]:
    """As `project_streams`, for one sequence that begins with `length` text tokens."""
    q, k, v = (getattr(module, name)(hidden_states).unflatten(-1, (module.heads, -1)) for name in IMAGE_MAPS)
    q, k = norm(module.norm_q, q), norm(module.norm_k, k)
    if image_rotary_emb is not None:
        q, k = (apply_rotary_emb(each, image_rotary_emb, sequence_dim=1) for each in (q, k))
    return Heads(q[:, :length], k[:, :length], v[:, :length]), Heads(q[:, length:], k[:, length:], v[:, length:])


class JointATConv(SwappedLayer):
    """A joint attention whose cost is linear in image tokens. With text T, image I and g = sigmoid(text_share):

        text   softmax(q_T [k_T, k_I]) [v_T, v_I]                      as the attention
        image  (1 - g_h) (K2 * v_I) + g_h softmax(q_I k_T) v_T         per head h

    K2 as `KernelGenerator` makes it from the image tokens, convolved on the grid that `reference` tells. Maps and norms
    have the attention's names and sizes; those that only unread text would need are left out. The base of three.
    """

    def __init__(self, attention: nn.Module, reference: GridReference, options: LayerOptions, without: tuple = ()):
        value = attention.to_v
        super().__init__(value.in_features, value.out_features, reference, options)
        self.heads = attention.heads
        self.backend = attention_backend(attention.processor)
        self.text_share = nn.Parameter(torch.empty(attention.heads))
        self.to(value.weight.device, value.weight.dtype)
        for name in (*IMAGE_MAPS, *TEXT_MAPS, "to_add_out"):
            linear = getattr(attention, name, None)
            setattr(self, name, None if linear is None or name in without else _fresh(linear))
        for name in NORMS:
            each = getattr(attention, name, None)
            setattr(self, name, None if each is None or name in without else copy.deepcopy(each).requires_grad_())
        out = getattr(attention, "to_out", None)
        self.to_out = None if out is None else nn.ModuleList([_fresh(out[0]), nn.Dropout(out[1].p)])
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.text_share.zero_()

    def attend(self, q: torch.Tensor, *others: Heads) -> torch.Tensor:
        """softmax attention of q over the tokens of `others`."""
        k, v = (torch.cat([getattr(each, name) for each in others], 1) for name in "kv")
        return attend(q, k, v, self.backend).to(v.dtype)

    def mix(self, text: Heads, image: Heads, image_tokens: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Text (B, T, channels), None if it has no queries, and image (B, N, channels), before the output maps."""
        grid, v = self.reference.get(), image.v.flatten(2)
        convolved = self.convolve(on_grid(image_tokens, grid), on_grid(v, grid)).flatten(1, -2)
        share = self.text_share.sigmoid().to(v.dtype)[:, None]
        mixed = (1 - share) * convolved.unflatten(-1, (self.heads, -1)) + share * self.attend(image.q, text)
        return None if text.q is None else self.attend(text.q, text, image).flatten(2), mixed.flatten(2)


def _fresh(linear: nn.Linear) -> nn.Linear:
    weight = linear.weight
    return nn.Linear(
        linear.in_features, linear.out_features, linear.bias is not None, device=weight.device, dtype=weight.dtype
    )


class StreamsJointATConv(JointATConv):
    """For SD3's blocks and Flux's double ones: image (B, N, dim) and text (B, T, dim) -> both, each (B, tokens, dim).

    The text is None where nothing reads it, in SD3's last block. Raises InputError for an attention mask that would
    have counted, for an IP-adapter's tokens and where the text is missing.
    """

    def __init__(self, attention: nn.Module, reference: GridReference, options: LayerOptions):
        self_only = ("to_k", "norm_k", "add_q_proj", "norm_added_q")  # what text queries ask with, and ask of the image
        super().__init__(attention, reference, options, self_only if attention.to_add_out is None else ())
        self.masked = isinstance(attention, FluxAttention)  # SD3's attention takes a mask and does not look at it

    def forward(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **extra
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        refuse(attention_mask=attention_mask if self.masked else None, ip_hidden_states=extra.get("ip_hidden_states"))
        text, image = project_streams(self, hidden_states, encoder_hidden_states, image_rotary_emb=image_rotary_emb)
        text, image = self.mix(text, image, hidden_states)
        return self.to_out[1](self.to_out[0](image)), None if text is None else self.to_add_out(text)


class SequenceJointATConv(JointATConv):
    """For Flux's single blocks: one sequence of text and image (B, T + N, dim) -> (B, T + N, dim), no output map."""

    def forward(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_
    ) -> torch.Tensor:
        refuse(attention_mask=attention_mask)
        length = text_length(hidden_states, self.reference)
        text, image = project_sequence(self, length, hidden_states, image_rotary_emb)
        return torch.cat(self.mix(text, image, hidden_states[:, length:]), 1)


def text_length(sequence: torch.Tensor, reference: GridReference) -> int:
    """How many text tokens (B, T + N, dim) begins with, N filling the grid. Raises InputError where there is none."""
    height, width = reference.get()
    length = sequence.shape[1] - height * width
    if length <= 0:
        raise InputError(
            f"a sequence of {sequence.shape[1]} tokens has no text before an image of {height} x {width}; give text, "
            "and ids of the whole image"
        )
    return length


class JointGraft(Graft):
    """The base of the joint grafts. cls, processor: of the attention. maps: linears that each has."""

    joint = True
    cls: type[nn.Module]
    processor: type
    maps: tuple[str, ...]

    def refusal(self, attention: nn.Module) -> str | None:
        if reason := class_refusal(attention, self.cls, processors=(self.processor,)):
            return reason
        if is_fused(attention):
            return "has fused projections; call unfuse_qkv_projections first"
        missing = next((name for name in self.maps if getattr(attention, name.split(".")[0], None) is None), None)
        if missing is not None:
            return f"has no {missing}: it is no joint attention of the kind that this graft splits"
        also = () if getattr(attention, "to_add_out", None) is None else ("to_add_out",)
        return linear_refusal(attention, *self.maps, *also)

    def copy(self, attention: nn.Module, layer: JointATConv) -> None:
        """All maps as they are: the value's bias stays in the value, as text queries attend to it beside text's."""
        ours = layer.state_dict()
        shared = {name: tensor for name, tensor in attention.state_dict().items() if name in ours}
        layer.load_state_dict(shared, strict=False)

    def project(self, attention: nn.Module, layer: JointATConv, args: tuple, kwargs: dict) -> tuple[Heads, Heads]:
        """Text and image, as the attention projects them."""
        return project_streams(attention, *args, **kwargs)

    def text_share(self, attention, layer, args, kwargs) -> torch.Tensor:
        text, image = self.project(attention, layer, args, kwargs)
        ones, zeros = text._replace(v=torch.ones_like(text.v)), image._replace(v=torch.zeros_like(image.v))
        return layer.attend(image.q, ones, zeros)[..., 0].double().mean((0, 1))

    @torch.no_grad()
    def settle(self, layer: JointATConv, share: torch.Tensor) -> None:
        layer.text_share.copy_(share.clamp(1e-3, 1 - 1e-3).logit())

    def observe(self, attention, layer, args, kwargs):
        text, image = self.project(attention, layer, args, kwargs)
        share = layer.text_share.double().sigmoid()[:, None]
        mixed, read = layer.attend(image.q, text, image), layer.attend(image.q, text)
        return image.v.flatten(2), ((mixed.double() - share * read.double()) / (1 - share)).flatten(2)

    def approximated(self, layer, output):
        return output[0]


class SD3JointGraft(JointGraft):
    """The joint attention of SD3's blocks."""

    cls, processor, layer = Attention, JointAttnProcessor2_0, StreamsJointATConv
    maps = (*IMAGE_MAPS, *TEXT_MAPS, "to_out.0")


class FluxDoubleGraft(JointGraft):
    """The attention of Flux's double blocks."""

    cls, processor, layer = FluxAttention, FluxAttnProcessor, StreamsJointATConv
    maps = (*IMAGE_MAPS, *TEXT_MAPS, "to_out.0", "to_add_out")


class FluxSingleGraft(JointGraft):
    """The attention of Flux's single blocks."""

    cls, processor, layer = FluxAttention, FluxAttnProcessor, SequenceJointATConv
    maps = IMAGE_MAPS

    def project(self, attention, layer, args, kwargs):
        hidden_states, tables = argument("hidden_states", args, kwargs), argument("image_rotary_emb", args, kwargs, 3)
        return project_sequence(attention, text_length(hidden_states, layer.reference), hidden_states, tables)

    def approximated(self, layer, output):
        height, width = layer.reference.get()
        return output[:, -height * width :]
