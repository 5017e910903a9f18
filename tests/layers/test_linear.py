"""The call of a linear whose bias torch.compile can fuse with what follows, against the linear that it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sit_atconv import ATConv
from sit_atconv.layers.attention import Attention
from sit_atconv.layers.blocks import Mlp
from sit_atconv.layers.linear import linear


@pytest.fixture
def compiled():
    """torch.compile of a function, and the code of its graphs as they come into being."""
    torch._dynamo.reset()

    def compile_(function):
        graphs = []

        def backend(graph, _):
            graphs.append(graph.code)
            return graph

        return torch.compile(function, backend=backend, fullgraph=True), graphs

    return compile_


def products_with_bias(code: str) -> list[str]:
    return [line for line in code.splitlines() if "linear(" in line and "bias" in line]


@pytest.mark.parametrize("bias", [True, False])
def test_compiled_it_is_the_linear_with_its_gradients(compiled, bias):
    torch.manual_seed(0)
    module = nn.Linear(5, 7, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def with_gradients(function):
        y = function(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, *module.parameters()))

    actual = with_gradients(compiled(lambda x: linear(module, x))[0])
    expected = with_gradients(lambda x: F.linear(x, module.weight, module.bias))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "arguments", "apart"),
    [
        (Mlp(8, 16), (), 2),
        (Attention(8, 2), (), 1),
        (ATConv(8), ((3, 4),), 3),
    ],
)
def test_the_layers_call_it_and_their_biases_lie_outside_the_products(compiled, module, arguments, apart):
    x = torch.randn(2, 12, 8)
    function, graphs = compiled(module)
    torch.testing.assert_close(function(x, *arguments), module(x, *arguments), rtol=1e-4, atol=1e-5)
    (code,) = graphs
    linears = sum("linear(" in line for line in code.splitlines())
    assert linears - len(products_with_bias(code)) == apart


def test_off_a_cpu_the_bias_stays_in_the_product(compiled):
    module = nn.Linear(5, 7, device="meta")
    function, graphs = compiled(lambda x: linear(module, x))
    function(torch.randn(2, 3, 5, device="meta"))
    (code,) = graphs
    assert len(products_with_bias(code)) == 1


def test_autocast_rounds_the_result_as_it_does_the_linears(compiled):
    module, x = nn.Linear(5, 7), torch.randn(2, 3, 5)
    function, _ = compiled(lambda x: linear(module, x))
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
        """Knows the product of a linear with its bias alone, and doubles it."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            result = super().__torch_function__(function, types, args, kwargs or {})
            return torch.Tensor.mul(result, 2) if function is F.linear and len(args) == 3 else result

    module.weight = nn.Parameter(module.weight.detach().as_subclass(Quantised), requires_grad=False)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "change", [with_a_hook, with_a_hook_before, with_another_forward, with_an_adapter, with_a_quantised_weight]
)
def test_what_is_more_than_a_product_is_called_as_it_is(compiled, fast, change):
    torch.manual_seed(0)
    module, x = nn.Linear(5, 7), torch.randn(2, 3, 5)
    plain = linear(module, x)
    change(module)
    expected = module(x)
    assert (expected - plain).abs().max() > 0.1
    function = compiled(lambda x: linear(module, x))[0] if fast else lambda x: linear(module, x)
    torch.testing.assert_close(function(x), expected)


@pytest.mark.parametrize("change", [with_another_forward, with_an_adapter, with_a_quantised_weight])
def test_a_change_after_compilation_is_seen(compiled, change):
    """Hooks are not among the changes: torch.compile does not look for new ones in any module."""
    torch.manual_seed(0)
    module, x = nn.Linear(5, 7), torch.randn(2, 3, 5)
    function, graphs = compiled(lambda x: linear(module, x))
    torch.testing.assert_close(function(x), module(x))
    assert not products_with_bias(graphs[0])
    change(module)
    torch.testing.assert_close(function(x), module(x))


@pytest.mark.parametrize("kind", [nn.Identity, lambda: nn.Sequential(nn.Linear(5, 7), nn.SiLU())])
def test_any_module_may_take_the_place_of_the_linear(compiled, kind):
    module, x = kind(), torch.randn(2, 3, 5)
    torch.testing.assert_close(compiled(lambda x: linear(module, x))[0](x), module(x))


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_gradient_hooks_of_the_module_run(register):
    torch._dynamo.reset()
    module, seen = nn.Linear(5, 7), []
    getattr(module, register)(lambda *_: seen.append(1))
    function = torch.compile(lambda x: linear(module, x), backend="eager")  # no full graph: these hooks break it
    function(torch.randn(2, 3, 5, requires_grad=True)).sum().backward()
    assert seen


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_graph_shows_the_linear(strict):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 7)

        def forward(self, x):
            return linear(self.inner, x)

    exported = torch.export.export(Outer(), (torch.randn(2, 3, 5),), strict=strict)
    assert [node.target for node in exported.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.linear.default
    ]
