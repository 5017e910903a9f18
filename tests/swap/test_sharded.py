"""Swapped models under FSDP2, on two processes over gloo: outputs, gradients, saving and loading."""

import textwrap

import pytest
import torch
from swap_families import Family, outputs

from sit_atconv import ATConvFluxTransformer2DModel, ATConvWanTransformer3DModel

MODELS = {each.__name__: each for each in (ATConvWanTransformer3DModel, ATConvFluxTransformer2DModel)}
PROGRAM = """
    import copy, sys
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from sit_atconv.runtime.errors import InputError
    from sit_atconv.runtime.sharding import full_tensors, load_full
    from sit_atconv.swap import save_delta

    dist.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()

    def shard(model):
        for module in model.modules():
            if type(module).__name__ in type(model)._repeated_blocks:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(each, DTensor) for each in model.parameters())
        return model

    @torch.no_grad()
    def output(model, inputs):
        return model(**inputs).sample

    def losses(model, inputs):
        return [model(**each).sample.square().mean() for each in inputs]

    def close(ours, theirs, **options):
        torch.testing.assert_close(ours, theirs, **{"rtol": 1e-5, "atol": 1e-6} | options)

    def check(folder):
        model, inputs = torch.load(folder + "/given.pt", weights_only=False)
        whole, sharded = copy.deepcopy(model), shard(copy.deepcopy(model))
        for each in (*inputs, inputs[0]):
            close(output(sharded, each), output(whole, each))
        # Two sizes go through before either comes back, in another order on every process.
        for checkpointed in (False, True):
            if checkpointed:
                sharded.enable_gradient_checkpointing()
            for each, given in ((sharded.train(), inputs[:: 1 - 2 * rank]), (whole.train(), inputs)):
                each.zero_grad()
                sum(losses(each, given)).backward()
                each.eval()
            for (name, ours), theirs in zip(sharded.named_parameters(), whole.parameters(), strict=True):
                found = None if ours.grad is None else ours.grad.full_tensor()
                if theirs.grad is not None:
                    close(found, theirs.grad, rtol=1e-4, msg=name)
                else:
                    assert found is None or not found.any(), name
            assert sum(each.grad is not None for each in whole.parameters()) > 0.9 * len(list(whole.parameters()))
        for each in (sharded, whole):
            torch.optim.SGD(each.parameters(), lr=0.1).step()
        close(output(sharded, inputs[1]), output(whole, inputs[1]))
        # What writes the parameters that it finds is refused; what gathers them gives what any other model loads.
        for save in (lambda: sharded.save_pretrained(folder + "/not"), lambda: save_delta(sharded, folder + "/not")):
            try:
                save()
            except InputError as error:
                print("refused", error)
        full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        ours = full_tensors(sharded)
        if rank == 0:
            assert full.keys() == ours.keys() == whole.state_dict().keys()
            assert all(torch.equal(full[name], each) for name, each in ours.items())
            unsharded = copy.deepcopy(model)
            unsharded.load_state_dict(full)
            close(output(unsharded, inputs[0]), output(whole, inputs[0]))
            unsharded.save_pretrained(folder + "/saved")
            torch.save(output(unsharded, inputs[1]), folder + "/output.pt")
        dist.barrier()
        # Loaded: by itself and sharded after; from one process; from all of them; from a state as it is sharded.
        close(output(shard(type(model).from_pretrained(folder + "/saved").eval()), inputs[1]), output(whole, inputs[1]))
        other = shard(copy.deepcopy(model))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(other, full if rank == 0 else {}, options=options)
        close(output(other, inputs[0]), output(whole, inputs[0]))
        load_full(other, model.state_dict())
        close(output(other, inputs[0]), output(model, inputs[0]))
        other.load_state_dict(sharded.state_dict())
        close(output(other, inputs[0]), output(whole, inputs[0]))

    for folder in sys.argv[1:]:
        check(folder)
    dist.destroy_process_group()
    print("same")
"""


@pytest.mark.slow
def test_sharded_they_give_and_learn_what_they_do_whole(process_server, tmp_path):
    folders, given = [tmp_path / name for name in MODELS], {}
    for folder in folders:
        family = Family(folder.name.removeprefix("ATConv"))
        model = family.model()
        family.swapped(model)
        given[folder] = [family.inputs(model, which) for which in (0, 1)]
        folder.mkdir()
        torch.save((model, given[folder]), folder / "given.pt")
    codes, said = process_server(textwrap.dedent(PROGRAM), tmp_path, folders, {}, {})
    assert codes == [0, 0], said
    for rank in range(2):
        *refused, same = (tmp_path / f"printed-{rank}").read_text().splitlines()
        assert len(refused) == 4
        for saved, delta in (refused[:2], refused[2:]):
            assert "no plain tensor any more" in saved
            assert "is a DTensor since the swap" in delta
        assert same == "same"
    for folder in folders:
        assert not (folder / "not").exists()
        saved = MODELS[folder.name].from_pretrained(folder / "saved").eval()
        expected = torch.load(folder / "output.pt")
        torch.testing.assert_close(outputs(saved, given[folder][1])[0], expected, rtol=1e-5, atol=1e-6)
