"""Reads the golden vectors; tolerances as in golden/README.md."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(info, state dict, other tensors) of one file."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    rest = {key: value for key, value in tensors.items() if not key.startswith("state.")}
    return json.loads((FOLDER / "index.json").read_text())[name], state, rest


def assert_golden(actual: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
    """1e-5 of the largest magnitude, at least 2e-5; `factor` 10 for gradients."""
    tolerance = factor * max(1e-5 * expected.abs().max().item(), 2e-5)
    error = (actual - expected).abs().max().item()
    assert error <= tolerance, f"off by {error:.2e}, tolerance {tolerance:.2e}"
