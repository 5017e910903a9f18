"""Forward-mode derivatives through swapped models of other libraries."""

import pytest
import torch
from joint_models import random_weights
from swap.test_joint import KINDS
from swap.test_joint import stir as stir_joint
from swap.test_joint import swapped as swapped_joint
from swap.test_vit import PREFIXES, images, stir
from swap.test_vit import swapped as swapped_vit
from tangents import assert_reverse_over_forward, assert_tangent

from sit_atconv import swap_attention
from sit_atconv.ops.forward_mode import exact_derivatives


def check(model, x, rest, **rough):
    def f(x):
        with exact_derivatives():
            y = model(x, **rest)
        return getattr(y, "sample", y)

    dx = x.flip(-1).roll(1, 1)
    assert_tangent(f, (x,), (dx,), **rough)
    parameters = [each for each in model.parameters() if each.numel() > 1]
    assert_reverse_over_forward(f, x, dx, parameters, **({"tolerance": 1e-5, "step": 1e-4} if rough else {}))


@pytest.mark.parametrize("kind", ["dit", "pixart", "unet"])
def test_diffusers(tiny, kind):
    model = tiny.model(kind).double()
    swap_attention(model, "all")
    x, *rest = tiny.inputs(kind, dtype=torch.float64).items()
    check(random_weights(model), x[1], dict(rest))


@pytest.mark.parametrize("kind", KINDS)
def test_joint(kind):
    model, _, inputs = swapped_joint(kind, dtype=torch.float64)
    stir_joint(model)
    x, *rest = inputs((3, 4)).items()
    # Their norms and angles are worked out in fp32.
    check(model, x[1], dict(rest), tolerance=1e-3, step=1e-3)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_vit(prefix):
    model, _ = swapped_vit(torch.float64, qk_norm=True, **PREFIXES[prefix])
    stir(model)
    check(model, images().double(), {})


def test_what_torch_cannot_do_is_an_error_and_not_zero(tiny):
    """The text attention of a U-Net is torch's."""
    model = tiny.model("unet").double()
    swap_attention(model, "all")
    x, *rest = tiny.inputs("unet", dtype=torch.float64).items()
    with pytest.raises(NotImplementedError, match="forward AD with _scaled_dot_product_flash_attention_for_cpu"):
        torch.func.jvp(lambda x: model(x, **dict(rest)).sample, (x[1],), (x[1],))
