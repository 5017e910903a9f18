"""What a CPU cannot show: the same numbers on a CUDA device. Run with `make test-gpu`."""

import pytest
import torch
from conftest import reset_accelerate
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from golden_vectors import assert_golden, golden

from sit_atconv import ATConv, SiTPipeline, SiTTransformer2DModel, create_model
from sit_atconv.config import load_recipe
from sit_atconv.latents.codecs import IdentityCodec
from sit_atconv.ops.atconv import POOLS, dynamic_depthwise_conv, reference
from sit_atconv.sampling.graphs import Graphs
from sit_atconv.sampling.sampling import generate, sample_latents
from sit_atconv.sampling.settings import Sampling
from sit_atconv.training import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def exact_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [(7, 9), (16, 16)])
def test_operator_is_as_exact_as_the_oracle(dtype, grid):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, *grid, 24, generator=generator).to("cuda", dtype)
    kernels = torch.randn(2, 9, 24, generator=generator).to("cuda", dtype)
    exact = reference.dynamic_depthwise_conv(v.double(), kernels.double())
    own = (reference.dynamic_depthwise_conv(v, kernels).double() - exact).abs().max()
    fast = (dynamic_depthwise_conv(v, kernels).double() - exact).abs().max()
    assert fast <= 2 * own + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(
    ("shape", "k"), [((2, 7, 9, 24), 3), ((1, 64, 64, 1152), 3), ((2, 16, 16, 70), 5), ((2, 1, 2, 3), 3)]
)
def test_pooling_and_its_transpose_are_exact(shape, k, pool, dtype):
    pytest.importorskip("triton")
    from ops.triton_interpreted import assert_pools_as_exactly_as_fp32_sums_allow

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to("cuda", dtype) + 1
    upstream = torch.randn(shape[0], k * k, shape[-1], generator=generator).to("cuda", dtype)
    assert_pools_as_exactly_as_fp32_sums_allow(x, k, pool, upstream)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2], ids=str
)
@pytest.mark.parametrize(
    ("size", "rule"),
    [
        ((64, 9, 1152), ("gelu_tanh", "learned")), ((3, 25, 70), ("gelu", "full")), ((2, 49, 64), ("silu", "learned")),
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_the_kernels_of_a_layer_is_exact(size, rule, dtypes):
    pytest.importorskip("triton")
    from ops.triton_taps_interpreted import assert_exact, draw

    inputs, upstream = draw(*size, rule[1], True, *dtypes)
    assert_exact([None if each is None else each.cuda() for each in inputs], upstream.cuda(), *rule)


def test_golden_layer_with_gradients():
    _, state, tensors = golden("op_sit")
    layer = ATConv(12)
    layer.load_state_dict(state)
    layer.cuda()
    x = tensors["x"].cuda().requires_grad_()
    y = layer(x, grid=(16, 16))
    assert_golden(y.cpu(), tensors["y"])
    y.backward(tensors["grad_y"].cuda())
    assert_golden(x.grad.cpu(), tensors["grad_x"], factor=10)


@pytest.mark.parametrize("sampler", ["euler", "rk4", "dopri5", "euler-maruyama", "sde-heun"])
@pytest.mark.parametrize("mixer", ["attention", "atconv", "hybrid"])
def test_samples_are_those_of_the_cpu(mixer, sampler):
    torch.manual_seed(0)
    model = create_model(
        None, 8, 3, patch_size=2, in_channels=1, hidden_size=16, depth=2, num_heads=2, token_mixer=mixer
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    arguments = (IdentityCodec(), [0, 5], [1, 2], Sampling(sampler, steps=5))
    on_cpu, nfe = generate(model, *arguments)
    on_gpu, gpu_nfe = generate(model.cuda(), *arguments)
    assert nfe == gpu_nfe
    assert (on_cpu.int() - on_gpu.int()).abs().max() <= 1


def test_a_guide_is_replayed_beside_the_model_to_the_bit():
    torch.manual_seed(0)
    shape = {"patch_size": 2, "depth": 1, "num_heads": 2, "token_mixer": "atconv"}
    model, guide = (create_model(None, 8, 3, hidden_size=width, **shape).eval().cuda() for width in (32, 16))
    for parameter in (*model.parameters(), *guide.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    sampling, graphs = Sampling(steps=12, guidance_interval=[0.2, 0.8], guide=guide), Graphs()
    arguments = (model, [0, 5], torch.tensor([1, 2], device="cuda"), sampling)
    for _ in range(2):
        assert torch.equal(sample_latents(*arguments, graphs=graphs)[0], sample_latents(*arguments)[0])
    assert all(graph.replay for each in (graphs, graphs.beside) for graph in each._graphs.values())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["euler", "rk4", "dopri5", "sde-heun"])
def test_graphs_change_no_bit_and_give_their_memory_back(sampler, dtype, compiled):
    torch.manual_seed(0)
    model = create_model(None, 8, 3, patch_size=2, hidden_size=32, depth=2, num_heads=2, token_mixer="hybrid").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.to("cuda", dtype)
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)
    sampling, graphs = Sampling(sampler, steps=12, guidance_interval=[0.2, 0.8]), Graphs()
    drawn = [
        (model, indices, torch.tensor(labels, device="cuda"), sampling)
        for indices, labels in (([0, 5], [1, 2]), ([7, 8], [0, 1]), ([9], [2]))
    ]
    for arguments in drawn:  # a batch of another size may compile anew, to other kernels
        sample_latents(*arguments)
    for arguments in drawn:
        eager, nfe = sample_latents(*arguments)
        replayed, same = sample_latents(*arguments, graphs=graphs)
        assert torch.equal(replayed, eager)
        assert nfe == same
    assert any(graph.replay for graph in graphs._graphs.values())
    held = torch.cuda.memory_allocated()
    graphs.clear()
    assert torch.cuda.memory_allocated() < held


@pytest.mark.parametrize(
    "sampling",
    [Sampling(steps=8), Sampling("rk4", steps=4, guidance_scale=1.0)],  # rk4 keeps four outputs of a step
    ids=lambda sampling: sampling.sampler,
)
def test_whole_models_compile_to_graphs_of_their_own(sampling):
    torch.manual_seed(0)
    model = create_model(None, 8, 3, patch_size=2, hidden_size=32, depth=2, num_heads=2, token_mixer="hybrid").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.cuda()
    arguments = ([0, 5], torch.tensor([1, 2], device="cuda"), sampling)
    expected, _ = sample_latents(model, *arguments)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    drawn, _ = sample_latents(compiled, *arguments, graphs=Graphs())
    torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_trains_and_goes_on(recipe_file, precision):
    for steps in ("5", "8"):
        reset_accelerate()
        overrides = [f"train.precision={precision}", f"train.max_steps={steps}", "train.max_grad_norm=1"]
        last = train(load_recipe(recipe_file(), overrides))
    assert last.name == "step-0000008"


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_a_pipeline_draws_what_it_draws_on_the_cpu_offloaded_or_not(scheduler):
    torch.manual_seed(0)
    model = SiTTransformer2DModel(
        sample_size=8, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=3, token_mixer="hybrid"
    )

    def draw(pipe) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        return pipe([0, 2], num_inference_steps=5, generator=generators, output_type="pt").images.cpu()

    pipe = SiTPipeline(model, scheduler=scheduler)
    on_cpu = draw(pipe)
    torch.testing.assert_close(draw(pipe.to("cuda")), on_cpu, atol=1e-3, rtol=1e-3)
    pipe.to("cpu")
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(draw(pipe), on_cpu, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("mixer", ["attention", "atconv", "hybrid"])
def test_group_offload_with_streams_and_compiled_blocks(mixer):
    torch.manual_seed(0)
    options = {"sample_size": 8, "hidden_size": 16, "depth": 4, "num_heads": 2, "num_classes": 3}
    model = SiTTransformer2DModel(**options, token_mixer=mixer).eval()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 2]))
    with torch.no_grad():
        expected = model(*inputs).sample
        on_gpu = [tensor.cuda() for tensor in inputs]
        by_block = {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": True}
        model.enable_group_offload(torch.device("cuda"), **by_block)
        torch.testing.assert_close(model(*on_gpu).sample.cpu(), expected, atol=1e-4, rtol=1e-4)
        compiled = SiTTransformer2DModel(**options, token_mixer=mixer).eval()
        compiled.load_state_dict(model.state_dict())
        compiled.cuda().compile_repeated_blocks(fullgraph=True)
        torch.testing.assert_close(compiled(*on_gpu).sample.cpu(), expected, atol=1e-4, rtol=1e-4)
