"""Torch operators of this package: how one is defined, and the derivatives of those that are linear in each tensor."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import register_flop_formula

from sit_atconv.ops.forward_mode import forward_mode, levels
from sit_atconv.runtime.compat.torch import (
    SingleLevelFunction,
    any_requires_grad,
    enable_single_level_autograd_function,
    is_forward_grad_enabled,
    redispatch_below_autograd,
    set_forward_grad_enabled,
)

# Of the operators in torch.ops: the package's name. An exported pipeline has this module in a package of another name
# (`pipelines.bundle`), since it may be loaded beside this one or beside an export of another version.
NAMESPACE = __package__.split(".")[-2]


def define(
    name: str, function: Callable, fake: Callable, derivatives: Callable | None = None, flops: Callable | None = None
):
    """The torch operator NAMESPACE::name, defined unless it is there already: this source may be imported twice.

    function: its annotations give the schema; it runs on every device. fake: the same for tensors without values.
    derivatives (library, name, operator): registers them, such as `multilinear`. flops: the formula for torch's
    FlopCounterMode.
    """
    operators = getattr(torch.ops, NAMESPACE)
    if not hasattr(operators, name):
        # Not torch.library.custom_op: it takes the key Autograd, and torch 2.11 refuses a second kernel there.
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
        library.define(name + torch.library.infer_schema(function, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
        packet = getattr(operators, name)
        packet.library = library  # its end would be the operator's: it outlives this module
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(packet.default, fake, lib=library)
        if derivatives is not None:
            derivatives(library, name, packet.default)
        if flops is not None:
            register_flop_formula(packet)(flops)
    return getattr(operators, name).default


def multilinear(count: int, gradients: Callable) -> Callable:
    """For `define`: derivatives of any order, reverse and forward, and vmap, of an operator (*tensors, *settings) that
    is linear in each of its `count` tensors (B, ...), and whose samples are independent.

    gradients (upstream, needed, tensors, shapes, settings): the gradient of each tensor that is needed, else None, by
    such operators in turn; a tensor is None unless the gradient of another one is needed.
    """

    def register(library: torch.library.Library, name: str, operator) -> None:
        library.impl(name, _differentiable(operator, count, gradients), "Autograd", with_keyset=True)
        torch.library.register_vmap(operator, _batched(operator, count), lib=library)

    return register


def _differentiable(operator, count: int, gradients: Callable) -> Callable:
    """What the operator does under the key Autograd.

    `custom_op.register_autograd` knows no forward mode: without a gradient to keep it drops tangents without a word,
    and it refuses the transforms of torch.func. As there, the function runs only where something is to be kept.
    """

    class Multilinear(SingleLevelFunction):
        @staticmethod
        def forward(keyset, grad, tangents, *arguments):
            if not levels():
                return redispatch_below_autograd(operator, keyset, arguments)
            # The levels below this one differentiate on; `apply` has switched that off for all of them.
            with torch.set_grad_enabled(grad), set_forward_grad_enabled(tangents):
                return redispatch_below_autograd(operator, keyset, arguments)

        @staticmethod
        def setup_context(ctx, inputs, output):
            _, _, ctx.tangents, *arguments = inputs
            tensors, ctx.settings = arguments[:count], arguments[count:]
            ctx.shapes = [tensor.shape for tensor in tensors]
            ctx.needed = ctx.needs_input_grad[3 : 3 + count]
            others = [any(ctx.needed[:i] + ctx.needed[i + 1 :]) for i in range(count)]
            ctx.save_for_backward(*(tensor if used else None for tensor, used in zip(tensors, others, strict=True)))
            ctx.save_for_forward(*tensors)

        @staticmethod
        def backward(ctx, upstream):
            to_tensors = gradients(upstream, ctx.needed, ctx.saved_tensors, ctx.shapes, ctx.settings)
            return None, None, None, *to_tensors, *(None for _ in ctx.settings)

        @staticmethod
        def jvp(ctx, keyset, grad, tangents, *directions):
            # Torch switches tangents off here, and a jvp of a jvp would lose the outer one's. With them on, what
            # was saved must not bring its own.
            with set_forward_grad_enabled(ctx.tangents):
                tensors = [unpack_dual(saved, level=0).primal for saved in ctx.saved_tensors]
                parts = [
                    operator(*tensors[:i], direction, *tensors[i + 1 :], *ctx.settings)
                    for i, direction in enumerate(directions[:count])
                    if direction is not None
                ]
                return sum(parts[1:], parts[0])

    def kernel(keyset, *arguments):
        transformed = levels()
        if transformed or forward_mode() or (torch.is_grad_enabled() and any_requires_grad(*arguments)):
            state = keyset, torch.is_grad_enabled(), is_forward_grad_enabled()
            with enable_single_level_autograd_function() if transformed else nullcontext():
                return Multilinear.apply(*state, *arguments)
        return redispatch_below_autograd(operator, keyset, arguments)

    return kernel


def _batched(operator, count: int) -> Callable:
    """vmap: the mapped dimension joins the batch."""

    def rule(info, in_dims, *arguments):
        tensors = [
            tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
            for tensor, dim in zip(arguments[:count], in_dims[:count], strict=True)
        ]
        result = operator(*(tensor.flatten(0, 1) for tensor in tensors), *arguments[count:])
        return result.unflatten(0, (info.batch_size, -1)), 0

    return rule


def sees_tangents() -> bool:
    """Whether an operator gets the tangents that are taken here: compiled, it cannot see that its graph makes dual
    tensors, unless a transform of torch.func does. Plain torch calls have rules of their own."""
    return not torch.compiler.is_compiling() or not forward_mode() or levels()
