"""How many kernels CUDA is given; see `inductor_for_cuda`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("triton", reason="triton is not installed: it is released for Linux alone")


@pytest.mark.slow
def test_a_compiled_block_launches_few_kernels_beside_its_matrix_products():
    """SiT-ATConv-XL/2, bf16, 256 px: a block, and an evaluation with its 28 blocks; each compiled in one graph."""
    script = Path(__file__).with_name("inductor_for_cuda.py")
    run = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    found = json.loads(run.stdout)
    block, whole = found["block, compiled"], found["evaluation, compiled"]
    assert block["product"] == 6  # modulation, x_proj, kernel_proj, proj, and the two of the MLP
    assert block["own"] == 3  # pooling, the kernels, the convolution
    assert sum(block.values()) - block["product"] <= 14
    assert sum(whole.values()) - whole["product"] <= 28 * 14 + 14
