"""Linears around whose product nothing is left to do, against the linears that they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sit_atconv.layers.linear import linear, linear_of_few_rows

CALLS = [linear, linear_of_few_rows]


def compiled(call, module):
    """`call` of the module under torch.compile, and the code of its graph as it will be there."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    return torch.compile(lambda x: call(module, x), backend=backend, fullgraph=True), graphs


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_it_is_the_linear_with_its_gradients(call, bias, fast):
    torch.manual_seed(0)
    module = nn.Linear(5, 7, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def with_gradients(function):
        y = function(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, *module.parameters()))

    function = compiled(call, module)[0] if fast else lambda x: call(module, x)
    actual = with_gradients(function)
    expected = with_gradients(lambda x: F.linear(x, module.weight, module.bias))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert actual[0].is_contiguous()


@pytest.mark.parametrize("call", CALLS)
def test_compiled_the_bias_lies_outside_the_product(call):
    module = nn.Linear(5, 7)
    function, graphs = compiled(call, module)
    function(torch.randn(2, 3, 5))
    (code,) = graphs
    assert "bias" in code
    assert " + " in code
    for line in code.splitlines():
        assert not ("bias" in line and ("linear(" in line or "@" in line or "matmul" in line)), line


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fast", [True, False])
def test_autocast_rounds_the_result_as_it_does_the_linears(call, fast):
    module, x = nn.Linear(5, 7), torch.randn(2, 3, 5)
    function = compiled(call, module)[0] if fast else lambda x: call(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = module(x), function(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


def with_a_hook(module):
    module.register_forward_hook(lambda module, args, y: 2 * y)


def with_a_hook_before(module):
    module.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def with_another_forward(module):
    """As offloading does it."""
    module.forward = lambda x: 2 * F.linear(x, module.weight, module.bias)


def with_an_adapter(module):
    class Adapted(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module.__class__ = Adapted


def with_a_quantised_weight(module):
    class Quantised(torch.Tensor):
        """Knows the product of a linear alone, and doubles it."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__):
                raise NotImplementedError(function)
            result = super().__torch_function__(function, types, args, kwargs or {})
            return torch.Tensor.mul(result, 2) if function is F.linear else result

    module.weight = nn.Parameter(module.weight.detach().as_subclass(Quantised), requires_grad=False)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "change", [with_a_hook, with_a_hook_before, with_another_forward, with_an_adapter, with_a_quantised_weight]
)
def test_what_is_more_than_a_product_is_called_as_it_is(call, fast, change):
    torch.manual_seed(0)
    module, x = nn.Linear(5, 7), torch.randn(2, 3, 5)
    plain = call(module, x)
    change(module)
    expected = module(x)
    assert (expected - plain).abs().max() > 0.1
    function = compiled(call, module)[0] if fast else lambda x: call(module, x)
    torch.testing.assert_close(function(x), expected)


@pytest.mark.parametrize("call", CALLS)
def test_gradient_hooks_of_the_module_run(call):
    module, seen = nn.Linear(5, 7), []
    module.register_full_backward_hook(lambda *_: seen.append(1))
    call(module, torch.randn(2, 3, 5, requires_grad=True)).sum().backward()
    assert seen


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_graph_shows_the_linear(call, strict):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 7)

        def forward(self, x):
            return call(self.inner, x)

    exported = torch.export.export(Outer(), (torch.randn(2, 3, 5),), strict=strict)
    assert [node.target for node in exported.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.linear.default
    ]
