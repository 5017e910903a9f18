"""The grid of a swapped model is of one pass: not of the model, whoever else calls it, wherever it is computed anew."""

import copy
import io
import math
import threading
import time

import pytest
import timm
import torch
from joint_models import flux, flux_inputs, raster, sd3, sd3_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

from sit_atconv import swap_attention
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.hooks import recorded
from sit_atconv.swap.grid import ids_grid

KINDS = ("dit", "pixart", "unet", "sd3", "flux", "vit")
WIDE, HIGH = (2, 6), (6, 2)  # as many tokens
every = pytest.mark.parametrize("kind", KINDS)


class Swapped:
    """A swapped model of a kind. inputs(grid, seed), call(inputs) -> output; blocks: those that hold its layers."""

    def __init__(self, tiny, kind):
        torch.manual_seed(0)
        self.kind, self.tiny = kind, tiny
        if kind == "vit":
            sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 7, "dynamic_img_size": True}
            self.model = timm.models.VisionTransformer(img_size=16, patch_size=4, **sizes).eval()
        elif kind in tiny.makers:
            self.model = tiny.model(kind)
        else:
            self.model = {"sd3": sd3, "flux": flux}[kind]()
        options = {"joint": "split", "calib": [self.inputs(WIDE)]} if kind in ("sd3", "flux") else {}
        self.swap = swap_attention(self.model, "all", init="copy_vo", **options)
        for layer in self.swap.layers.values():  # kernels that no turn of the grid leaves as they are
            layer.kernel_gen.bias.data.normal_()
        names = {name.rpartition(".")[0] for name in self.swap.layers}
        self.blocks = [self.model.get_submodule(name) for name in sorted(names)]

    def inputs(self, grid, seed=0):
        if self.kind == "vit":
            return {"x": torch.randn(2, 3, 4 * grid[0], 4 * grid[1], generator=torch.Generator().manual_seed(seed))}
        if self.kind in self.tiny.makers:
            return self.tiny.inputs(self.kind, (2 * grid[0], 2 * grid[1]), seed=seed)
        return {"sd3": sd3_inputs, "flux": flux_inputs}[self.kind](grid, seed=seed)

    def call(self, inputs, model=None):
        output = (self.model if model is None else model)(**inputs)
        return output if self.kind == "vit" else output.sample

    def gradients(self, losses):
        self.model.zero_grad()
        sum(losses).backward()
        return {name: each.grad.clone() for name, each in self.model.named_parameters() if each.grad is not None}

    def loss(self, grid):
        return self.call(self.inputs(grid)).square().sum()


def in_threads(*functions):
    found, threads = [None] * len(functions), []

    def run(index):
        try:
            found[index] = functions[index]()
        except Exception as error:  # told to the thread that waits
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        if isinstance(each, Exception):
            raise each
    return found


def met(meeting):
    """For a hook, whose result would take the place of what it saw."""
    meeting.wait()


def assert_same(ours, wanted):
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@every
def test_threads_have_grids_of_their_own(tiny, kind):
    """Both are within the first block, and then both within the last, before either goes on."""
    swapped = Swapped(tiny, kind)
    with torch.no_grad():
        alone = [swapped.call(swapped.inputs(grid)) for grid in (WIDE, HIGH)]
        assert not torch.allclose(alone[0].flatten(), alone[1].flatten(), atol=1e-3)
        meeting = threading.Barrier(2, timeout=60)
        for block in (swapped.blocks[0], swapped.blocks[-1]):
            block.register_forward_pre_hook(lambda *_: met(meeting))

        def run(grid):
            with torch.no_grad():
                return [swapped.call(swapped.inputs(grid)) for _ in range(3)]

        for found, expected in zip(in_threads(lambda: run(WIDE), lambda: run(HIGH)), alone, strict=True):
            assert all(torch.equal(each, expected) for each in found)


@every
def test_a_pass_within_a_pass_leaves_it_its_grid(tiny, kind):
    """Hooks that call the model around a block and around a layer, of which one pass fails half-way."""
    swapped, nested, within, failing = Swapped(tiny, kind), [], [], []
    block, layer = swapped.blocks[0], next(iter(swapped.swap.layers.values()))

    def fail(*_):
        if failing:
            raise RuntimeError(failing.pop())

    def call(*_):
        if not within:
            within.append(True)
            nested.append(swapped.call(swapped.inputs(HIGH)))
            failing.append("half-way")
            with pytest.raises(RuntimeError, match="half-way"):
                swapped.call(swapped.inputs(HIGH))
            within.pop()

    with torch.no_grad():
        wide, high = (swapped.call(swapped.inputs(grid)) for grid in (WIDE, HIGH))
        swapped.blocks[-1].register_forward_hook(fail)
        for module in (block, layer):
            module.register_forward_pre_hook(call)
            module.register_forward_hook(call)
        assert torch.equal(swapped.call(swapped.inputs(WIDE)), wide)
        assert len(nested) == 4
        assert all(torch.equal(each, high) for each in nested)


class Checkpointed(nn.Module):
    """A block, checkpointed by somebody else than its model."""

    def __init__(self, block, reentrant):
        super().__init__()
        self.checkpointed, self.reentrant, self.runs = block, reentrant, 0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("checkpointed"), name)

    def forward(self, *args, **kwargs):
        def run(*values):
            self.runs += 1
            named = zip(kwargs, values[len(args) :], strict=True)
            return self.checkpointed(*values[: len(args)], **dict(named))

        return checkpoint(run, *args, *kwargs.values(), use_reentrant=self.reentrant)


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_is_run_again_on_its_own_grid(tiny, kind, reentrant):
    """Two passes and one backward, which another thread runs."""
    swapped = Swapped(tiny, kind)
    plain = swapped.gradients([swapped.loss(grid) for grid in (WIDE, HIGH)])
    for name, module in list(swapped.model.named_modules()):
        if module in swapped.blocks:
            swapped.model.set_submodule(name, Checkpointed(module, reentrant))
    losses = [swapped.loss(grid) for grid in (WIDE, HIGH)]
    (found,) = in_threads(lambda: swapped.gradients(losses))
    assert {each.runs for each in swapped.model.modules() if isinstance(each, Checkpointed)} == {4}
    assert_same({name.replace("checkpointed.", ""): each for name, each in found.items()}, plain)


@every
def test_the_models_own_checkpointing_in_threads(tiny, kind):
    """Each thread runs a pass, and then the backward of the other's."""
    swapped = Swapped(tiny, kind)
    plain = [swapped.gradients([swapped.loss(grid)]) for grid in (HIGH, WIDE)]
    swapped.model.set_grad_checkpointing() if kind == "vit" else swapped.model.enable_gradient_checkpointing()
    meeting, losses = threading.Barrier(2, timeout=60), {}
    swapped.blocks[0].register_forward_pre_hook(lambda *_: None if len(losses) == 2 else met(meeting))

    def run(grid, other):
        losses[grid] = swapped.loss(grid)
        meeting.wait()
        return torch.autograd.grad(losses[other], list(parameters.values()), allow_unused=True)

    parameters = dict(swapped.model.named_parameters())
    for found, wanted in zip(in_threads(lambda: run(WIDE, HIGH), lambda: run(HIGH, WIDE)), plain, strict=True):
        found = {name: each for name, each in zip(parameters, found, strict=True) if each is not None}
        assert_same(found, wanted)


def test_timms_reentrant_checkpointing(tiny):
    swapped = Swapped(tiny, "vit")
    plain = swapped.gradients([swapped.loss(grid) for grid in (WIDE, HIGH)])
    swapped.model.set_grad_checkpointing()
    before = timm.layers.config.use_reentrant_ckpt()
    timm.layers.config.set_reentrant_ckpt(True)
    try:
        assert_same(swapped.gradients([swapped.loss(grid) for grid in (WIDE, HIGH)]), plain)
    finally:
        timm.layers.config.set_reentrant_ckpt(before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_whole_pass_that_is_run_again_checkpoints_its_blocks(tiny, reentrant):
    swapped = Swapped(tiny, "vit")
    plain = swapped.gradients([swapped.loss(grid) for grid in (WIDE, HIGH)])
    swapped.model.set_grad_checkpointing()

    def loss(grid):
        image = swapped.inputs(grid)["x"].requires_grad_()
        return checkpoint(swapped.model, image, use_reentrant=reentrant).square().sum()

    assert_same(swapped.gradients([loss(grid) for grid in (WIDE, HIGH)]), plain)


def test_what_no_block_tells_is_told_by_the_number_of_tokens_or_refused(tiny):
    """A layer that is called outside of any pass, as something does that computes a part of a block anew."""
    swapped = Swapped(tiny, "dit")
    attention = swapped.blocks[0].attn1
    swapped.call(swapped.inputs(WIDE))
    tokens = torch.randn(2, 12, 16)
    expected = attention.reference.set(WIDE, tokens.device) or attention(tokens)
    swapped.call(swapped.inputs(WIDE))  # what was told by hand goes with the next pass
    assert torch.equal(attention(tokens), expected)
    swapped.call(swapped.inputs((2, 2)))
    with pytest.raises(ValueError, match="do not fill a grid of 2 x 2"):
        attention(tokens)
    swapped.call(swapped.inputs(HIGH))
    with pytest.raises(InputError, match="after grids of as many tokens and other sides"):
        attention(tokens)
    attention.reference.set(WIDE, tokens.device)
    assert torch.equal(attention(tokens), expected)


@every
def test_replicas_share_a_grid_with_nobody(tiny, kind):
    """As DataParallel makes them: modules of their own, with the hooks and everything else of the model."""
    swapped = Swapped(tiny, kind)
    with torch.no_grad():
        alone = [swapped.call(swapped.inputs(grid)) for grid in (WIDE, HIGH)]
        meeting = threading.Barrier(2, timeout=60)
        swapped.blocks[0].register_forward_pre_hook(lambda *_: met(meeting))

        def replica():
            made = {each: each._replicate_for_data_parallel() for each in swapped.model.modules()}
            for module, each in made.items():
                each._modules = {name: made.get(child) for name, child in module._modules.items()}
                for name, parameter in module._parameters.items():
                    setattr(each, name, parameter)
            return made[swapped.model]

        def run(model, grid):
            with torch.no_grad():
                return swapped.call(swapped.inputs(grid), model)

        replicas = replica(), replica()
        found = in_threads(lambda: run(replicas[0], WIDE), lambda: run(replicas[1], HIGH))
        assert all(torch.equal(*each) for each in zip(found, alone, strict=True))


@every
def test_nothing_is_kept_of_tokens_that_are_gone(tiny, kind):
    swapped = Swapped(tiny, kind)
    references = {id(layer.reference): layer.reference for layer in swapped.swap.layers.values()}.values()
    loss = swapped.loss(WIDE)
    del loss
    assert not any(len(each.of_tokens) for each in references)
    assert all(each.now.shape is None and each.now.outer is None for each in references)


@pytest.mark.parametrize("kind", ["vit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[:4])])
def test_exported_it_is_the_same(tiny, kind):
    swapped = Swapped(tiny, kind)
    inputs = swapped.inputs(WIDE)
    with torch.no_grad():
        expected = swapped.call(inputs)
        exported = torch.export.export(swapped.model, (), inputs)
        torch.testing.assert_close(swapped.call(inputs, exported.module()), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(swapped.call(inputs), expected)


def test_a_traced_vit_is_the_same_and_a_script_says_what_to_use(tiny):
    swapped = Swapped(tiny, "vit")
    x = swapped.inputs(WIDE)["x"]
    traced, stored = torch.jit.trace(swapped.model, x), io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    loaded = torch.jit.load(stored)
    for each in (x, x[:1]):
        torch.testing.assert_close(loaded(each), swapped.model(each), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"torch.jit.script.*torch.export.export or torch.jit.trace"):
        torch.jit.script(swapped.model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "dit"])
def test_compiled_blocks_in_threads(tiny, kind):
    swapped = Swapped(tiny, kind)
    with torch.no_grad():
        alone = [swapped.call(swapped.inputs(grid)) for grid in (WIDE, HIGH)]
        torch._dynamo.reset()
        for block in swapped.blocks:
            block.compile(fullgraph=True, backend="eager")
        for grid in (WIDE, HIGH):
            swapped.call(swapped.inputs(grid))
        meeting = threading.Barrier(2, timeout=60)
        where = swapped.model.pos_embed if kind == "dit" else swapped.model.pos_drop
        where.register_forward_hook(lambda *_: met(meeting))

        def run(grid):
            with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
                return [swapped.call(swapped.inputs(grid)) for _ in range(2)]

        for found, expected in zip(in_threads(lambda: run(WIDE), lambda: run(HIGH)), alone, strict=True):
            for each in found:
                torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5)


def test_recorded_calls_are_those_of_the_thread():
    linear, results = nn.Linear(2, 2), {}
    meeting = threading.Barrier(2, timeout=60)

    def run(name):
        with recorded({"linear": linear}) as seen:
            x = torch.full((1, 2), float(name))
            meeting.wait()
            y = linear(x)
            meeting.wait()
            results[name] = seen["linear"][0][0] is x and seen["linear"][2] is y

    in_threads(lambda: run(1), lambda: run(2))
    assert results == {1: True, 2: True}
    assert not linear._forward_hooks


def test_a_dry_run_is_of_its_thread(tiny):
    """Neither does it learn of passes of others, nor do these run its layers."""
    model, calls, found, ours = tiny.model("dit"), [tiny.inputs("dit", seed=3)], [], threading.get_ident()

    def planned():
        return swap_attention(model, "all", calib=calls, dry_run=True).report(measure=False)

    def beside(*_):
        if threading.get_ident() == ours:
            found.extend(in_threads(lambda: tiny.run(model, "dit")))

    alone, plain = planned(), tiny.run(model, "dit")
    for block in model.transformer_blocks:
        block.attn1.to_out[0].register_forward_pre_hook(beside)
    assert planned() == alone
    assert found
    assert all(torch.equal(each, plain) for each in found)


def rounded(grid, dtype):
    return raster(grid).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "grid", [(1, 1), (1, 700), (700, 1), (2, 300), (300, 2), (1, 2), (2, 1), (257, 3), (3, 257), (260, 270), (2, 2300)]
)
def test_a_raster_in_any_precision_tells_its_grid(grid, dtype):
    ids = rounded(grid, dtype)
    for each in (ids, ids[None], ids.float(), ids + torch.tensor([1, 0, 0], dtype=dtype)):
        tokens = torch.empty(1, math.prod(grid), 1)
        assert ids_grid(None, (), {"img_ids": each, "hidden_states": tokens}) == grid


def test_what_is_no_raster_has_no_grid():
    def without(ids, *index):
        return ids[[each for each in range(len(ids)) if each not in index]]

    twice = raster((4, 3))
    twice[:, 1] = torch.tensor([0, 1, 1, 2]).repeat_interleave(3)  # a row twice, far from where bf16 rounds
    for dtype in (torch.float32, torch.bfloat16):
        for ids in (
            twice, without(raster((3, 4)), 5), without(raster((3, 4)), 11), raster((3, 4)).flip(0),
            torch.cat([raster((3, 4)), raster((3, 4))]), torch.zeros(6, 3), without(rounded((3, 300), dtype), 299),
            raster((3, 4)).view(3, 4, 3).transpose(0, 1).flatten(0, 1),
        ):  # fmt: skip
            with pytest.raises(InputError, match="are no full raster"):
                ids_grid(None, (), {"img_ids": ids.to(dtype)})
    kontext = torch.cat([raster((3, 300)), raster((2, 4)) + torch.tensor([1.0, 0, 0])])
    with pytest.raises(InputError, match="number 2 images"):
        ids_grid(None, (), {"img_ids": kontext.bfloat16()})


def wrong_outputs(tiny, kinds, seconds):
    """(calls, wrong ones) of two threads for each model, which call it at shapes of as many tokens for so long."""
    models = [Swapped(tiny, kind) for kind in kinds]
    ends, counts, wrong = time.monotonic() + seconds, [], []
    with torch.no_grad():
        alone = [[each.call(each.inputs(grid)) for grid in (WIDE, HIGH)] for each in models]

    def work(swapped, grid, expected):
        def run():
            inputs, count = swapped.inputs(grid), 0
            with torch.no_grad():
                while not count or time.monotonic() < ends:
                    count += 1
                    if not torch.equal(swapped.call(inputs), expected):
                        wrong.append((swapped.kind, grid))
            counts.append(count)

        return run

    in_threads(
        *(
            work(swapped, grid, expected)
            for swapped, both in zip(models, alone, strict=True)
            for grid, expected in zip((WIDE, HIGH), both, strict=True)
        )
    )
    return sum(counts), wrong


@pytest.mark.parametrize("seconds", [1, pytest.param(300, marks=pytest.mark.slow)])
def test_two_threads_and_four_models(tiny, seconds):
    calls, wrong = wrong_outputs(tiny, ("dit", "flux", "vit", "unet"), seconds)
    print(f"{calls} calls, {len(wrong)} wrong")
    assert calls >= 8
    assert not wrong


def test_copies_know_nothing_of_a_pass(tiny):
    swapped = Swapped(tiny, "vit")
    reference = swapped.swap.layers["blocks.0.attn"].reference
    copies = []
    swapped.blocks[1].register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(reference)))
    swapped.call(swapped.inputs(WIDE))
    assert copies[0].now.shape is None
    assert copies[0].first == reference.first
    assert copies[0].first is not reference.first
