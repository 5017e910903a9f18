"""Attention over text and image together, split: exact for the text, ATConv and a share of the text for the image."""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from sit_atconv.layers.attention import attend
from sit_atconv.layers.norm import norm
from sit_atconv.ops.atconv import on_grid
from sit_atconv.runtime.compat.diffusers import attention_backend
from sit_atconv.runtime.errors import InputError
from sit_atconv.swap.grafts import Graft, class_refusal, is_fused, linear_refusal
from sit_atconv.swap.grid import GridReference
from sit_atconv.swap.layers import LayerOptions, SwappedLayer


class Streams(NamedTuple):
    """A call with text and image apart, as `JointGraft.inputs` finds it.

    image (B, N, dim), text (B, T, dim). image_rope, text_rope: their positions, as `JointGraft.rotate` takes them.
    mask: (B, T), true where a text token counts, or (B, 1, queries, keys) over text and image in this order, as
    `scaled_dot_product_attention` takes it; None: all count.
    """

    image: torch.Tensor
    text: torch.Tensor
    image_rope: object = None
    text_rope: object = None
    mask: torch.Tensor | None = None


class Sequence(NamedTuple):
    """A call with text and image in one sequence, as `SingleStreamGraft.inputs` finds it.

    tokens (B, S, dim). rope: their positions. mask: (B, S), true where a token counts, or (B, 1, queries, keys).
    """

    tokens: torch.Tensor
    rope: object = None
    mask: torch.Tensor | None = None


class Layout(NamedTuple):
    """Where text and image stand in a sequence: `text` tokens are of the text, and the image comes first or last; or
    places: indices (B, tokens) of the text and of the image, where samples differ in it."""

    text: int
    image_first: bool = False
    places: tuple[torch.Tensor, torch.Tensor] | None = None

    def split(self, x: torch.Tensor, dim: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Text and image of x, whose dimension `dim` is the sequence; with places, the second."""
        if self.places is not None:
            text, image = (_picked(x, index) for index in self.places)
            return text, image
        first = x.shape[dim] - self.text if self.image_first else self.text
        parts = x.split([first, x.shape[dim] - first], dim)
        return (parts[1], parts[0]) if self.image_first else (parts[0], parts[1])

    def join(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """The sequence (B, S, ...) of both."""
        if self.places is not None:
            return _picked(torch.cat([text, image], 1), torch.cat(self.places, 1).argsort(1))
        return torch.cat([image, text] if self.image_first else [text, image], 1)


def _picked(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.take_along_dim(index.view(*index.shape, *[1] * (x.ndim - 2)), 1)


class Heads(NamedTuple):
    """Queries, keys and values of one kind of token, each (B, tokens, heads, head_dim); None where nothing asks."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor


class Call(NamedTuple):
    """A call of an attention, projected. tokens (B, N, dim): of the image. masks: of queries of the text and of the
    image, each over the keys of both, text first. rest: what else the output is made of."""

    text: Heads
    image: Heads
    tokens: torch.Tensor
    masks: tuple[torch.Tensor | None, torch.Tensor | None]
    layout: Layout
    rest: object = None


class JointATConv(SwappedLayer):
    """A joint attention whose cost is linear in image tokens. With text T, image I and g = sigmoid(text_share):

        text   softmax(q_T [k_T, k_I]) [v_T, v_I]                      as the attention
        image  (1 - g_h) (K2 * v_I) + g_h softmax(q_I k_T) v_T         per head h

    K2 as `KernelGenerator` makes it from the image tokens, convolved on the grid that `reference` tells. Maps and norms
    have the attention's names and sizes; those that only unread text would need are left out. It is called as the
    attention, and gives what that gives; `graft` tells both. Where nothing reads the text, in SD3's last block, it
    is the text's values. Raises InputError for what the graft refuses, such as an IP-Adapter's tokens or a missing
    text.
    """

    def __init__(self, graft: "JointGraft", attention: nn.Module, reference: GridReference, options: LayerOptions):
        super().__init__(*graft.sizes(attention), reference, options)
        self.graft, self.heads, self.kv_heads = graft, graft.heads(attention), graft.kv_heads(attention)
        self.backend = attention_backend(getattr(attention, "processor", None))
        self.text_share = nn.Parameter(torch.empty(self.heads))
        weight = attention.get_submodule(graft.linears(attention)[0]).weight
        self.to(weight.device, weight.dtype)
        for name, part in graft.parts(attention).items():
            setattr(self, name, None if part is None else _fresh(part))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.text_share.zero_()
        for name in filter(None, self.graft.norms):
            for key, parameter in getattr(self, name).named_parameters() if getattr(self, name) is not None else ():
                parameter.fill_(0 if key == "bias" else self.graft.norm_weight)

    def forward(self, *args, **kwargs):
        self.warn_of(kwargs)
        call = self.graft.project(self, self.reference.get(), args, kwargs)
        return self.graft.output(self, call, *self.mix(call))

    def attend(self, q: torch.Tensor, mask: torch.Tensor | None, *others: Heads) -> torch.Tensor:
        """softmax attention of q over the tokens of `others`, the first ones that the mask is on."""
        k, v = (torch.cat([getattr(each, name) for each in others], 1) for name in "kv")
        if mask is not None:
            mask = mask[..., : k.shape[1]]
            mask = mask.to(q.dtype) if mask.is_floating_point() else mask
        return attend(q, k, v, self.backend, mask=mask).to(v.dtype)

    def share(self, call: Call) -> torch.Tensor:
        """g (heads, 1); with a mask (B, 1 or N, heads, 1), and 0 where an image query has no text to read."""
        share, mask = self.text_share.sigmoid()[:, None], call.masks[1]
        return share if mask is None else share * _reads_text(mask, call)[..., None, None]

    def mix(self, call: Call) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Text (B, T, channels), None if it has no queries, and image (B, N, channels), before the output maps."""
        grid, v, (of_text, of_image) = self.reference.get(), call.image.v.flatten(2), call.masks
        convolved = self.convolve(on_grid(call.tokens, grid), on_grid(v, grid)).flatten(1, -2)
        share = self.share(call).to(v.dtype)
        read = self.attend(call.image.q, of_image, call.text)
        mixed = (1 - share) * convolved.unflatten(-1, (self.heads, -1)) + share * read
        text = None if call.text.q is None else self.attend(call.text.q, of_text, call.text, call.image).flatten(2)
        return text, mixed.flatten(2)


def _fresh(part: nn.Module) -> nn.Module:
    """A copy that can be trained; of a linear map its sizes alone, as its weights come from `reset_parameters`."""
    if isinstance(part, nn.ModuleList):
        return nn.ModuleList([_fresh(each) for each in part])
    if not isinstance(part, nn.Linear):
        return copy.deepcopy(part).requires_grad_()
    weight = part.weight
    return nn.Linear(
        part.in_features, part.out_features, part.bias is not None, device=weight.device, dtype=weight.dtype
    )


class JointGraft(Graft):
    """An attention over text and image together that is called with both apart: softmax(q k^T / sqrt(head_dim)) v.

    A subclass tells its class and the names of its parts, and, where it is not called as diffusers calls one, `inputs`:

    image, text: the linear maps of their queries, keys and values; the same names where they share them.
    norms: of the image's queries and keys, and of the text's, each per head; not there, or None: none.
    out, text_out: the output maps, a linear or a list with one first; None or not there: none.
    more: further linear maps that the layer has too. norm_weight: where the weights of the norms start.
    """

    joint = True
    cls = Attention
    image: tuple[str, str, str] = ("to_q", "to_k", "to_v")
    text: tuple[str, str, str] = ("add_q_proj", "add_k_proj", "add_v_proj")
    norms: tuple[str | None, ...] = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    out: str | None = "to_out"
    text_out: str | None = "to_add_out"
    more: tuple[str, ...] = ()
    norm_weight: float = 1.0

    def inputs(
        self, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_
    ) -> Streams:
        """What a call of the attention is on; its arguments are the attention's own. image_rotary_emb: a pair of
        tables over text and image."""
        text = with_text(encoder_hidden_states)
        return Streams(hidden_states, text, *ropes_of(image_rotary_emb, text.shape[1]), attention_mask)

    def rotate(self, x: torch.Tensor, rope) -> torch.Tensor:
        """Queries or keys (B, tokens, heads, head_dim) at their positions."""
        return apply_rotary_emb(x, rope, sequence_dim=1)

    def kv_heads(self, attention: nn.Module) -> int:
        """How many heads keys and values have, which the heads of queries share in groups."""
        return self.heads(attention)

    def sizes(self, attention: nn.Module) -> tuple[int, int]:
        """Channels of the tokens, and of what is mixed."""
        queries = getattr(attention, self.image[0])
        return queries.in_features, queries.out_features

    def linears(self, attention: nn.Module) -> list[str]:
        """The linear maps that the layer has too."""
        found = []
        for name in dict.fromkeys((*self.image, *self.text, *self.more, self.out, self.text_out)):
            part = None if name is None else getattr(attention, name, None)
            if part is not None:
                found.append(f"{name}.0" if isinstance(part, nn.ModuleList) else name)
        return found

    def parts(self, attention: nn.Module) -> dict[str, nn.Module | None]:
        """What the layer has of the attention, by name; None for what is not there, or only unread text would need."""
        names = filter(None, dict.fromkeys((*self.image, *self.text, *self.more, self.text_out, *self.norms, self.out)))
        unread = ()
        if self.text_out is not None and getattr(attention, self.text_out, None) is None:
            unread = (self.image[1], self.text[0], *self.norms[1:3])
        return {name: None if name in unread else getattr(attention, name, None) for name in names}

    def refusal(self, attention: nn.Module) -> str | None:
        if reason := class_refusal(attention, self.cls, processors=self.processors):
            return reason
        if is_fused(attention):
            return "has fused projections; call unfuse_qkv_projections first"
        wanted = (*self.image, *self.text, *self.more, self.out)
        missing = next((name for name in wanted if name and getattr(attention, name, None) is None), None)
        if missing is not None:
            return f"has no {missing}: it is no joint attention of the kind that this graft splits"
        return linear_refusal(attention, *self.linears(attention))

    def build(self, attention: nn.Module, reference: GridReference, options: LayerOptions) -> JointATConv:
        return JointATConv(self, attention, reference, options)

    def copy(self, attention: nn.Module, layer: JointATConv) -> None:
        """All maps as they are: the value's bias stays in the value, as text queries attend to it beside text's."""
        ours = layer.state_dict()
        shared = {name: tensor for name, tensor in attention.state_dict().items() if name in ours}
        layer.load_state_dict(shared, strict=False)

    def project(self, module: nn.Module, grid: tuple[int, ...], args: tuple, kwargs: dict) -> Call:
        """A call of the attention, or of the layer for it, which `module` is, on a grid."""
        found = self.inputs(*args, **kwargs)
        text = self.heads_of(module, self.text, self.norms[2:], found.text, found.text_rope)
        image = self.heads_of(module, self.image, self.norms[:2], found.image, found.image_rope)
        layout, mask = Layout(found.text.shape[1]), found.mask
        if mask is not None and mask.ndim == 2:
            mask = F.pad(mask.bool(), (0, found.image.shape[1]), value=True)
        return Call(text, image, found.image, _masks(mask, layout), layout)

    def heads_of(self, module: nn.Module, maps: tuple, norms: tuple, tokens: torch.Tensor, rope) -> Heads:
        """Queries, keys and values of tokens (B, n, dim) by the maps of these names."""
        linears = [getattr(module, name) for name in maps]
        made = [None if linear is None else linear(tokens) for linear in linears]
        return self.headed(module, norms, made, rope)

    def headed(self, module: nn.Module, norms: tuple, made: list, rope) -> Heads:
        """Queries, keys and values (B, n, channels), or None, as heads: normalised, rotated, as many of each."""
        heads = self.heads(module)
        kv_heads = module.kv_heads if isinstance(module, JointATConv) else self.kv_heads(module)
        q, k, v = (
            None if each is None else each.unflatten(-1, (count, -1))
            for each, count in zip(made, (heads, kv_heads, kv_heads), strict=True)
        )
        q, k = (self._normalised(module, name, each) for name, each in zip((*norms, None, None), (q, k), strict=False))
        if rope is not None:
            q, k = (None if each is None else self.rotate(each, rope) for each in (q, k))
        q, k = (None if each is None else each.to(v.dtype) for each in (q, k))
        if heads != kv_heads:
            k, v = (None if each is None else each.repeat_interleave(heads // kv_heads, 2) for each in (k, v))
        return Heads(q, k, v)

    def normalise(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys (B, tokens, heads, head_dim) by one of `norms`."""
        return norm(part, x)

    def _normalised(self, module: nn.Module, name: str | None, x: torch.Tensor | None) -> torch.Tensor | None:
        part = None if name is None or x is None else getattr(module, name, None)
        return x if part is None else self.normalise(part, x)

    def output(self, module: nn.Module, call: Call, text: torch.Tensor | None, image: torch.Tensor):
        """What the attention gives for text and image (B, tokens, channels) before their output maps. Of text that
        nothing reads (None) it is its values: tensors of the attention's shapes, for whoever wraps the layer."""
        text = call.text.v.flatten(2) if text is None else _applied(module, self.text_out, text)
        return _applied(module, self.out, image), text

    def approximated(self, layer, output, args, kwargs):
        return output[0]

    def text_share(self, attention, layer, args, kwargs) -> torch.Tensor:
        call = self.project(attention, layer.reference.get(), args, kwargs)
        ones = call.text._replace(v=torch.ones_like(call.text.v))
        zeros = call.image._replace(v=torch.zeros_like(call.image.v))
        mass = layer.attend(call.image.q, call.masks[1], ones, zeros)[..., 0].double()
        if call.masks[1] is None:
            return mass.mean((0, 1))
        reads = _reads_text(call.masks[1], call).double()[..., None].expand_as(mass)
        return (mass * reads).sum((0, 1)) / reads.sum((0, 1)).clamp_min(1)

    @torch.no_grad()
    def settle(self, layer: JointATConv, share: torch.Tensor) -> None:
        layer.text_share.copy_(share.clamp(1e-3, 1 - 1e-3).logit())

    def observe(self, attention, layer, args, kwargs):
        call = self.project(attention, layer.reference.get(), args, kwargs)
        share = layer.share(call).double()
        mixed = layer.attend(call.image.q, call.masks[1], call.text, call.image)
        read = layer.attend(call.image.q, call.masks[1], call.text)
        return call.image.v.flatten(2), ((mixed.double() - share * read.double()) / (1 - share)).flatten(2)


class SingleStreamGraft(JointGraft):
    """An attention over one sequence of text and image, with maps for both: as `JointGraft`, of which `text` and
    `text_out` say nothing here.

    image_first: whether the image begins the sequence; else it ends it. All other tokens are text, padding too.
    """

    text = ()
    norms = ("norm_q", "norm_k")
    text_out = None
    image_first = False

    def inputs(self, hidden_states, attention_mask=None, image_rotary_emb=None, **_) -> Sequence:
        """What a call of the attention is on; its arguments are the attention's own."""
        return Sequence(hidden_states, image_rotary_emb, attention_mask)

    def layout(self, found: Sequence, count: int) -> Layout:
        """Where the text is, and the image of `count` tokens."""
        return Layout(found.tokens.shape[1] - count, self.image_first)

    def project(self, module, grid, args, kwargs) -> Call:
        found, count = self.inputs(*args, **kwargs), math.prod(grid)
        if found.tokens.shape[1] <= count:
            raise InputError(
                f"a sequence of {found.tokens.shape[1]} tokens has no text beside an image of "
                f"{' x '.join(map(str, grid))}; give text, and ids of the whole image"
            )
        whole, rest = self.whole(module, found)
        layout = self.layout(found, count)
        text, image = zip(*(layout.split(each) for each in whole), strict=True)
        _, tokens = layout.split(found.tokens)
        return Call(Heads(*text), Heads(*image), tokens, _masks(found.mask, layout), layout, rest)

    def whole(self, module: nn.Module, found: Sequence) -> tuple[Heads, object]:
        """Queries, keys and values of the sequence, and what else of it `output` takes."""
        return self.heads_of(module, self.image, self.norms, found.tokens, found.rope), None

    def output(self, module, call, text, image):
        return _applied(module, self.out, call.layout.join(text, image))

    def approximated(self, layer, output, args, kwargs):
        layout = self.layout(self.inputs(*args, **kwargs), math.prod(layer.reference.get()))
        return layout.split(output)[1]


def with_text(text: torch.Tensor | None) -> torch.Tensor:
    """The text of a call. Raises InputError where it is missing."""
    if text is None:
        raise InputError("a joint attention was called without encoder_hidden_states; the split needs the text tokens")
    return text


def ropes_of(tables: tuple[torch.Tensor, ...] | None, length: int) -> tuple:
    """Those of the image and of the text, of tables (S, ...) over both, which begin with text of this length."""
    if tables is None:
        return None, None
    return tuple(each[length:] for each in tables), tuple(each[:length] for each in tables)


def rotated(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """x (B, tokens, heads, head_dim), pairs of neighbours times complex turns (tokens, d / 2) or (B, tokens, d / 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns.unsqueeze(-2)).flatten(-2).type_as(x)


def _masks(mask: torch.Tensor | None, layout: Layout) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of queries of the text and of the image, over text and image: (B, 1, 1 or queries, keys)."""
    if mask is None:
        return None, None
    if mask.ndim == 2:
        keys = torch.cat(layout.split(mask.bool()), 1)[:, None, None]
        return keys, keys
    keys = torch.cat(layout.split(mask, 3), 3)
    return (keys, keys) if keys.shape[2] == 1 else layout.split(keys, 2)


def _applied(module: nn.Module, name: str | None, x: torch.Tensor) -> torch.Tensor:
    """x through the output map of that name, one or several in turn."""
    part = None if name is None else getattr(module, name, None)
    for each in () if part is None else part if isinstance(part, nn.ModuleList) else (part,):
        x = each(x)
    return x


def _reads_text(mask: torch.Tensor, call: Call) -> torch.Tensor:
    """Whether image queries may read a token of the text: (B, 1 or N), of their mask over the keys of both."""
    of_text = mask[:, 0, :, : call.text.v.shape[1]]
    return (of_text if of_text.dtype == torch.bool else of_text > -torch.inf).any(-1)
