"""Private parts of other libraries: each is where `compat` looks for it, and does what is relied on."""

import ast
import os
import re
import signal
import sys
import time
import tomllib
from pathlib import Path

import joint_models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from conftest import ROOT
from diffusers.loaders import PeftAdapterMixin
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from sit_atconv import SiTPipeline, create_model
from sit_atconv.runtime.compat import accelerate, diffusers, numpy, timm
from sit_atconv.runtime.compat import torch as compat

FILES = sorted(path for path in (ROOT / "sit_atconv/runtime/compat").glob("*.py") if path.stem != "__init__")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
RANGE = re.compile(r"([A-Za-z0-9-]+)>=([0-9.]+),<([0-9.]+)")


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def allowed() -> dict[str, tuple[str, str]]:
    """(lowest version, first one beyond) by library; fails where one has not both."""
    extras = [each for extra in PROJECT["optional-dependencies"].values() for each in extra]
    ranges = [each for each in [*PROJECT["dependencies"], *extras] if not each.startswith("sit_atconv[")]
    return {(found := RANGE.fullmatch(each))[1]: (found[2], found[3]) for each in ranges}


def parts(path) -> list[str]:
    """The names that a file of `compat` gives to the rest of the package."""
    nodes = ast.parse(path.read_text()).body
    functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    return functions + [target.id for node in nodes if isinstance(node, ast.Assign) for target in node.targets]


def test_every_library_has_a_lowest_version_and_an_end_above_the_version_tested():
    for library, (low, end) in allowed().items():
        major, tested = PINS[library].split(".")[:2]
        assert [int(part) for part in low.split(".")] <= [int(part) for part in PINS[library].split(".")], library
        assert end in (f"{int(major) + 1}", f"{major}.{int(tested) + 1}"), library


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_library_with_private_parts_ends_with_the_minor_version_tested(path):
    major, tested = PINS[path.stem].split(".")[:2]
    assert allowed()[path.stem][1] == f"{major}.{int(tested) + 1}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_above_each_part_stand_the_versions_it_was_seen_in_and_the_reason(path):
    seen = dict.fromkeys(minor(version) for version in (allowed()[path.stem][0], PINS[path.stem]))
    blocks = re.split(r"\n\n+(?=# [a-z]+ [0-9])", path.read_text())[1:]
    named = [name for block in blocks for name in re.findall(r"^(?:def )?(\w+)(?:\(| = )", block, re.MULTILINE)]
    assert named == [name for name in named if name in parts(path)]
    assert sorted(named) == sorted(parts(path))
    for block in blocks:
        assert block.startswith(f"# {path.stem} {', '.join(seen)}: "), block


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_part_is_used_and_has_its_test(path):
    texts = [each.read_text() for folder in ("sit_atconv", "sampling") for each in (ROOT / folder).rglob("*.py")]
    program = "\n".join(text for text in texts if "sit_atconv.runtime.compat" in text)
    tests = (ROOT / "tests/runtime/test_compat.py").read_text()
    module = "compat" if path.stem == "torch" else path.stem
    for name in parts(path):
        assert re.search(rf"\b{name}\b", program), name
        assert f"{module}.{name}" in tests, name


def test_forward_mode_is_loaded_without_a_word(recwarn):
    compat.load_forward_mode()
    assert "torch._decomp.decompositions_for_jvp" in sys.modules
    assert not recwarn.list


class Doubling(compat.SingleLevelFunction):
    """x^2, whose derivative is given as 2x."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, upstream):
        return 2 * ctx.saved_tensors[0] * upstream


def test_single_level_functions_differentiate_one_level_of_a_transform():
    levels = []

    def square(x):
        levels.append(compat.is_wrapped(x))
        with compat.enable_single_level_autograd_function():
            return Doubling.apply(x)

    x = torch.tensor(3.0)
    assert torch.func.grad(square)(x) == 6
    assert levels == [True]
    with pytest.raises(RuntimeError):
        torch.func.grad(Doubling.apply)(x)


def test_tangents_are_switched_off_and_told_of():
    x = torch.tensor(3.0)
    assert compat.is_forward_grad_enabled()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.tensor(1.0))
        with compat.set_forward_grad_enabled(False):
            assert not compat.is_forward_grad_enabled()
            assert forward_ad.unpack_dual(dual * dual).tangent is None
        with compat.set_forward_grad_enabled(True):
            assert forward_ad.unpack_dual(dual * dual).tangent == 6


def test_levels_of_dual_tensors_and_transforms_are_told_of():
    def seen(x):
        return torch.full_like(x, compat.in_transform()), torch.full_like(x, compat.is_wrapped(x))

    x = torch.zeros(2)
    assert not compat.in_dual_level()
    assert not compat.in_transform()
    assert not compat.is_wrapped(x)
    with forward_ad.dual_level():
        assert compat.in_dual_level()
        assert not compat.in_transform()
    assert [each.tolist() for each in torch.func.vmap(seen)(x)] == [[1, 1], [1, 1]]


def test_gradients_are_seen_among_arguments_and_in_transforms():
    x = torch.zeros(2)
    seen = []

    def look(x):
        seen.append(compat.any_requires_grad(x, 3))
        return x.sum()

    assert not compat.any_requires_grad(x, 1, "name", None)
    assert compat.any_requires_grad(1, "name", None, x.clone().requires_grad_())
    torch.func.grad(look)(x)
    assert seen == [True]


def test_a_kernel_of_autograd_calls_those_below_it():
    library = torch.library.Library("compat_of_tests", "DEF")
    library.define("add_one(Tensor x, int n) -> Tensor")
    seen, operator = [], torch.ops.compat_of_tests.add_one.default

    def above(keyset, *arguments):
        seen.append("above")
        return compat.redispatch_below_autograd(operator, keyset, arguments)

    def below(x, n):
        seen.append("below")
        return x + n  # below autograd: nothing is recorded

    library.impl("add_one", below, "CompositeExplicitAutograd")
    library.impl("add_one", above, "Autograd", with_keyset=True)
    y = operator(torch.zeros(1, requires_grad=True), 2)
    assert seen == ["above", "below"]
    assert y == 2
    assert not y.requires_grad


def test_a_backward_pass_is_known_from_within():
    seen = [compat.in_backward()]
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: seen.append(compat.in_backward()))
    (x * 2).backward()
    assert [*seen, compat.in_backward()] == [False, True, False]


@pytest.fixture
def graphs():
    """A backend of torch.compile that runs graphs as they are, and keeps the shapes that they were made for."""
    torch.compiler.reset()
    made = []

    def backend(graph, examples):
        made.append([tuple(each.shape) for each in examples if isinstance(each, torch.Tensor)])
        return graph.forward

    backend.made = made
    yield backend
    torch.compiler.reset()


def test_compiled_modules_are_known_and_unwrapped(graphs):
    linear = nn.Linear(2, 2)
    wrapped = torch.compile(linear, backend=graphs)
    assert isinstance(wrapped, compat.OptimizedModule)
    assert compat.uncompiled(wrapped) is linear
    assert compat.uncompiled(linear) is linear
    assert not compat.has_compiled_call(linear)
    linear.compile(backend=graphs)
    assert compat.has_compiled_call(linear)
    assert not isinstance(linear, compat.OptimizedModule)


def test_marked_sizes_are_free_unless_the_graph_fixes_them(graphs):
    def run(function, sizes):
        del graphs.made[:]
        compiled = torch.compile(function, backend=graphs)
        for size in sizes:
            x = torch.ones(size, 2)
            compat.maybe_mark_dynamic(x, (0,))
            assert torch.equal(compiled(x), function(x))
        return len(graphs.made)

    assert run(lambda x: x * x.shape[0], [3, 4, 5]) == 1
    assert run(lambda x: x + torch.ones(3, 2), [3]) == 1


def test_sizes_of_a_graph_are_compared_without_fixing_them():
    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if compat.statically_known_true(x.shape[0] == 5) else x - 1

    assert compat.statically_known_true(2 == 2)
    assert not compat.statically_known_true(2 == 3)
    program = torch.export.export(Branch(), (torch.ones(5, 2),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    assert [tuple(program.module()(torch.ones(n, 2)).shape) for n in (5, 7)] == [(5, 2), (7, 2)]
    assert program.module()(torch.ones(7, 2)).eq(0).all()


@pytest.mark.parametrize("strict", [False, True])
def test_is_exporting_tells_export_from_compile(strict):
    class Told(nn.Module):
        def forward(self, x):
            return x + 1 if compat.is_exporting() else x

    x = torch.zeros(2)
    assert torch.equal(torch.compile(Told(), backend="eager", fullgraph=True)(x), x)
    assert torch.equal(torch.export.export(Told(), (x,), strict=strict).module()(x), x + 1)
    assert torch.equal(Told()(x), x)


def test_a_skipped_function_begins_no_graph_and_is_part_of_others(graphs):
    def inner(x):
        return x + 1

    def outer(x):
        return inner(x) * 2

    compat.skip_as_frame(inner)
    x = torch.zeros(3)
    torch.compile(inner, backend=graphs)(x)
    assert graphs.made == []
    assert torch.compile(outer, backend=graphs, fullgraph=True)(x).eq(2).all()
    assert graphs.made == [[(3,)]]


def test_hooks_are_listed_put_first_and_taken_off():
    calls, linear = [], nn.Linear(2, 2)
    key = compat.hook_key()
    assert not compat.is_hooked(linear)
    linear.register_forward_pre_hook(lambda *_: calls.append("registered"))
    compat.put_hooks(linear, key, lambda *each: calls.append(("before", each[2])), lambda *_: calls.append("after"))
    assert compat.is_hooked(linear)
    assert len(compat.forward_pre_hooks(linear)) == 2
    linear(input=torch.zeros(1, 2))
    assert [each if isinstance(each, str) else each[0] for each in calls] == ["before", "registered", "after"]
    assert list(calls[0][1]) == ["input"]
    with pytest.raises(TypeError):
        linear()
    assert calls[-1] == "after"  # after an error, too
    compat.remove_hooks(linear, lambda hook: True)
    assert not compat.is_hooked(linear)
    del calls[:]
    linear(torch.zeros(1, 2))
    assert calls == []
    for register in (linear.register_forward_hook, linear.register_full_backward_hook):
        handle = register(lambda *_: None)
        assert compat.is_hooked(linear)
        handle.remove()
    assert not compat.is_hooked(linear)
    assert compat.hook_key() != key


def test_fake_parameters_are_parameters_and_subclasses_are_not():
    class Quantised(torch.Tensor):
        pass

    assert compat.is_parameter(nn.Linear(2, 2).weight)
    assert not compat.is_parameter(torch.zeros(2))
    assert not compat.is_parameter(nn.Parameter(torch.zeros(2).as_subclass(Quantised)))
    with FakeTensorMode():
        assert compat.is_parameter(nn.Linear(2, 2).weight)
        assert not compat.is_parameter(torch.zeros(2))


def test_a_state_dict_carries_metadata_by_module():
    state = nn.Sequential(nn.BatchNorm2d(2)).state_dict()
    assert compat.metadata_of(state)["0"]["version"] == nn.BatchNorm2d._version
    assert compat.metadata_of({}) is None


def test_trees_of_arguments():
    tree = {"a": [1, (2,)], "b": 3}
    assert compat.tree_leaves(tree) == [1, 2, 3]
    assert compat.tree_map(lambda leaf: -leaf, tree) == {"a": [-1, (-2,)], "b": -3}
    paths = [(compat.keystr(path), leaf) for path, leaf in compat.tree_leaves_with_path(tree)]
    assert paths == [("['a'][0]", 1), ("['a'][1][0]", 2), ("['b']", 3)]


def test_lists_of_tensors_move_as_single_ones():
    generator = torch.Generator().manual_seed(0)
    ours, ends = ([torch.randn(3, 5, generator=generator), torch.randn(7, generator=generator)] for _ in range(2))
    expected = [a.lerp(b, 0.3) for a, b in zip(ours, ends, strict=True)]
    compat.lerp_each(ours, ends, 0.3)
    assert all(map(torch.equal, ours, expected))
    compat.copy_each(ours, ends)
    assert all(map(torch.equal, ours, ends))


def test_onednn_says_whether_it_takes_bf16():
    taken, info = compat.onednn_takes_bf16(), Path("/proc/cpuinfo")
    assert isinstance(taken, bool)
    assert taken or not info.is_file() or "avx512_bf16" not in info.read_text()


@pytest.mark.parametrize("queries", [6, 3])
def test_attention_on_a_cpu_is_counted_as_its_two_products(queries):
    q, k, v = torch.zeros(2, 4, queries, 8), torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 6, 8)
    with FlopCounterMode(display=False, custom_mapping=compat.formulas_of_attention()) as counter:
        F.scaled_dot_product_attention(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * (2 * 4 * queries * 6 * 8)


def test_memory_is_tracked_on_a_cpu():
    linear, x = nn.Linear(1000, 1000, bias=False), torch.zeros(10, 1000)
    tracker = compat.memory_tracker()
    tracker.track_external(linear, x)
    with tracker, torch.no_grad():
        linear(x)
    peak = sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
    assert peak == 4 * (1000 * 1000 + 2 * 10 * 1000)


def test_loader_processes_may_die_unnoticed_and_need_no_end():
    assert compat.loader_processes(None) == []
    assert compat.loader_processes(iter(DataLoader(range(2)))) == []
    iterator = iter(DataLoader(range(1000), num_workers=2))
    workers = compat.loader_processes(iterator)
    assert len(workers) == 2
    next(iterator)
    compat.ignore_deaths(iterator)
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].join()
    time.sleep(0.1)  # a handler of SIGCHLD would raise here
    workers[1].kill()
    workers[1].join()
    compat.consider_ended(iterator)
    assert iterator._shutdown
    began = time.monotonic()
    iterator._shutdown_workers()
    assert time.monotonic() - began < 1


def small(**options) -> nn.Module:
    sizes = {"hidden_size": 8, "depth": 2, "num_heads": 2, "patch_size": 2}
    return create_model(None, sample_size=8, num_classes=3, **sizes, **options)


def test_registered_blocks_are_known_to_diffusers():
    from diffusers.hooks._helpers import TransformerBlockRegistry

    class Block(nn.Module):
        pass

    diffusers.register_block(Block)
    assert TransformerBlockRegistry.get(Block).return_hidden_states_index == 0
    assert TransformerBlockRegistry.get(Block).return_encoder_hidden_states_index is None


def test_what_a_hook_leaves_of_forward_is_taken_off_and_what_others_put_there_stays():
    from diffusers.hooks import HookRegistry, ModelHook

    class Double(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.ones(1, 3)
    for own in (False, True):
        module = Double(3, 2)
        if own:
            module.forward = lambda x: x
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.register_hook(ModelHook(), "hook")
        registry.remove_hook("hook")
        assert "forward" in vars(module)
        diffusers.drop_left_forward(module)
        assert ("forward" in vars(module)) == own
        module.__class__ = nn.Linear
        assert torch.equal(module(x), x if own else nn.functional.linear(x, module.weight, module.bias))


def test_a_cache_begins_anew():
    from diffusers import FirstBlockCacheConfig

    model, runs = small(token_mixer="atconv"), []
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.blocks[-1].attn.register_forward_pre_hook(lambda *_: runs.append(1))
    model.enable_cache(FirstBlockCacheConfig(threshold=1000.0))
    for expected in (1, 1, 2):  # the last one after the reset
        if expected == 2:
            diffusers.reset_cache(model)
        with torch.no_grad(), model.cache_context("one"):
            model(torch.ones(1, 4, 8, 8), 0.5, torch.tensor([0]))
        assert len(runs) == expected


def test_adapters_are_those_of_the_mixin(monkeypatch):
    ours, theirs = vars(diffusers.Adapters), vars(PeftAdapterMixin)
    own = {"__dict__", "__doc__", "__module__", "__weakref__", "__annotations__"}
    assert set(ours) - own == set(theirs) - own
    plain = {"_hf_peft_config_loaded", "_prepare_lora_hotswap_kwargs"}
    assert {name: ours[name] for name in plain} == {name: theirs[name] for name in plain}
    seen = []
    monkeypatch.setattr(PeftAdapterMixin, "fuse_lora", lambda self, *args: seen.append((self, *args)))
    monkeypatch.setattr(PeftAdapterMixin, "_optionally_disable_offloading", classmethod(lambda *args: args))
    adapters = diffusers.Adapters()
    adapters.fuse_lora(0.5)
    assert seen == [(adapters, 0.5)]
    assert adapters._optionally_disable_offloading(1) == (diffusers.Adapters, 1)


def test_a_lora_is_fetched_from_a_dictionary_and_a_file(tmp_path):
    from safetensors.torch import save_file

    where = (
        "weight_name", "local_files_only", "cache_dir", "force_download", "proxies", "token", "revision", "subfolder",
    )  # fmt: skip
    options = dict.fromkeys(where) | {"use_safetensors": True, "user_agent": {}, "allow_pickle": False}
    tensors = {"transformer.x.lora_A.weight": torch.ones(2, 3)}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": '{"r": 2}'})
    state, metadata = diffusers.fetch_lora(tensors, **options, metadata={"r": 4})
    assert state is tensors
    assert metadata == {"r": 4}
    state, metadata = diffusers.fetch_lora(tmp_path, **options | {"weight_name": "lora.safetensors"})
    assert list(state) == list(tensors)
    assert metadata == {"r": 2}


def test_hooks_of_diffusers_are_listed():
    from diffusers.hooks import HookRegistry, ModelHook

    linear = nn.Linear(2, 2)
    assert not diffusers.diffusers_hooks(linear)
    HookRegistry.check_if_exists_or_initialize(linear).register_hook(ModelHook(), "mine")
    assert list(diffusers.diffusers_hooks(linear)) == ["mine"]


def test_a_configuration_is_told_and_set():
    from diffusers.configuration_utils import FrozenDict

    model = small()
    assert diffusers.config_of(model) is model.config
    assert diffusers.config_of(nn.Linear(2, 2)) is None
    diffusers.set_config(model, FrozenDict({"one": 1}))
    assert dict(model.config) == {"one": 1}


def test_the_function_that_checkpoints_is_told_and_set():
    model, calls = small(), []
    assert diffusers.checkpoint_function(nn.Linear(2, 2)) is None
    model.enable_gradient_checkpointing()
    before = diffusers.checkpoint_function(model)
    diffusers.set_checkpoint_function(model, lambda *each: calls.append(each[0]) or before(*each))
    x = torch.zeros(1, 4, 8, 8)
    model(x, 0.5, torch.tensor([0])).sample.sum().backward()
    assert calls == list(model.blocks)


def test_the_attention_backend_is_told_by_the_processors():
    model = joint_models.flux()
    processors = model.attn_processors.values()
    assert {diffusers.attention_backend(each) for each in processors} == {None}
    assert diffusers.attention_backend(object()) is None
    model.set_attention_backend("native")
    assert {diffusers.attention_backend(each).value for each in processors} == {"native"}


def test_parallelism_is_told_by_the_model(monkeypatch):
    from diffusers import ContextParallelConfig
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = joint_models.flux()
    assert not diffusers.is_parallel(model)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    finally:
        torch.distributed.destroy_process_group()
    assert diffusers.is_parallel(model)


def test_a_pipeline_tells_where_it_computes():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = SiTPipeline(small(), scheduler=FlowMatchEulerDiscreteScheduler())
    assert diffusers.execution_device(pipeline) == torch.device("cpu")
    for module in (pipeline.transformer, pipeline.transformer.blocks):
        add_hook_to_module(module, AlignDevicesHook(execution_device="meta"))
    assert diffusers.execution_device(pipeline) == torch.device("meta")


def test_dispatched_modules_are_known():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    linear = nn.Linear(2, 2)
    assert not accelerate.is_dispatched(linear)
    add_hook_to_module(linear, ModelHook())
    assert accelerate.is_dispatched(linear)
    remove_hook_from_module(linear)
    assert not accelerate.is_dispatched(linear)


def test_what_no_weight_has_a_part_in_is_real_beside_weights_without_storage():
    counter, begin = FlopCounterMode(display=False), torch.autocast.__init__
    mask, x, weight = torch.tensor([[True, True, False]]), torch.zeros(1, 3, 8), torch.empty(8, 8, device="meta")
    with compat.without_weights(), counter:
        length = mask.sum(1).tolist()[0]  # a number, where the meta device has none
        zero = bool((x == 0).all())
        linear = F.linear(x, weight) * mask[..., None]
        with torch.autocast(linear.device.type, enabled=False):
            shares = linear[:, :length] @ linear.transpose(1, 2)
    assert (length, zero) == (2, True)
    assert shares.is_meta
    assert shares.shape == (1, 2, 3)
    counts = counter.get_flop_counts()["Global"]
    assert compat.flops_between_tokens(counts) == 2 * 2 * 3 * 8
    assert sum(counts.values()) == 2 * (2 * 3 * 8 + 3 * 8 * 8)
    assert torch.autocast.__init__ is begin


def test_feature_maps_are_chosen_as_in_timm():
    assert timm.feature_take_indices(4, 2) == ([2, 3], 3)
    assert timm.feature_take_indices(4, None) == ([0, 1, 2, 3], 3)
    assert timm.feature_take_indices(4, [0, -2]) == ([0, 2], 2)


def test_a_bit_generator_begins_with_the_words_of_a_seed_sequence():
    class Words(numpy.ISeedSequence):
        def generate_state(self, n_words, dtype=np.uint32):
            return np.random.SeedSequence(7).generate_state(n_words, dtype)

    ours, theirs = np.random.PCG64(Words()), np.random.PCG64(np.random.SeedSequence(7))
    assert np.array_equal(ours.random_raw(5), theirs.random_raw(5))


def named_by_others():
    """(class of another library, names that it reads from its subclasses, and that ours define)."""
    from diffusers import DiffusionPipeline, ModelMixin
    from diffusers.loaders import FluxTransformer2DLoadersMixin, SD3Transformer2DLoadersMixin
    from diffusers.models.attention import AttentionModuleMixin

    return [
        (ModelMixin, ("_supports_gradient_checkpointing", "_no_split_modules", "_repeated_blocks")),
        (ModelMixin, ("_skip_layerwise_casting_patterns", "_cp_plan", "_tp_plan", "_parallel_config")),
        (AttentionModuleMixin, ("_default_processor_cls", "_available_processors", "_supports_qkv_fusion")),
        (DiffusionPipeline, ("_optional_components",)),
        (nn.Module, ("_save_to_state_dict", "_load_from_state_dict")),
        (SD3Transformer2DLoadersMixin, ("_load_ip_adapter_weights",)),
        (FluxTransformer2DLoadersMixin, ("_load_ip_adapter_weights",)),
    ]


def test_what_our_classes_tell_others_by_private_names_is_still_asked_for():
    for base, names in named_by_others():
        for name in names:
            assert hasattr(base, name), (base, name)


def test_a_process_has_the_number_it_joined_with(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert accelerate.joined_rank() is None
    PartialState(cpu=True)  # of no launch: it is alone
    assert accelerate.joined_rank() == 0
    PartialState().destroy_process_group()
    assert accelerate.joined_rank() == 0
