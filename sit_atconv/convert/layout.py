"""What the tensors of a checkpoint say of their model, in the public SiT layout."""

import math
import re
from functools import reduce
from typing import Any

import torch

from sit_atconv.flow.path import PATHS, PREDICTIONS
from sit_atconv.layers.embedders import sincos_position_embedding
from sit_atconv.models.sit import PATCH_SIZES, TOKEN_MIXERS, SiTTransformer2DModel, mixer_names
from sit_atconv.runtime.errors import InputError, check_choice, option

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published widths S, B, L, XL
ATCONV_PARTS = ("kernel_proj", "kernel_gen", "x_proj", "difference_control")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MATRICES = {  # by name, their dimensions
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
}
VAE_FACTOR = 8  # pixels per latent pixel of the autoencoder that the public checkpoints were trained with
DEFAULT_SAMPLE_SIZE = 32
PATH_NAMES = {"cosine": "gvp", "v": "velocity"}  # REPA's words for ours


def read_options(
    source: str, tensors: dict[str, torch.Tensor], args: dict[str, Any], told: dict[str, Any], form: str
) -> tuple[dict[str, Any], list[str]]:
    """The options of SiTTransformer2DModel that fit the tensors, and what had to be assumed, in words.

    told: what the user said of num_heads, sample_size, path and prediction, None where nothing; it goes before `args`,
    the training options stored with the checkpoint. form: "sit", "repa" or "dit".
    Raises InputError naming the tensors that are missing, unexpected or of another shape, and for options that the
    tensors leave open.
    """
    mixers = _mixers(tensors)
    _check_names(source, tensors, mixers)
    for name, dimensions in MATRICES.items():
        if tensors[name].ndim != dimensions:
            raise _shape_error(source, name, tensors[name].shape, f"{dimensions} dimensions are needed")
    hidden, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    if patch not in PATCH_SIZES:
        shape = tensors["x_embedder.proj.weight"].shape
        raise _shape_error(source, "x_embedder.proj.weight", shape, f"patches are {list(PATCH_SIZES)}")
    rows, output = len(tensors["y_embedder.embedding_table.weight"]), len(tensors["final_layer.linear.weight"])
    if rows < 2:
        raise _shape_error(source, "y_embedder.embedding_table.weight", (rows, hidden), "a class and a null class")
    # The tensors cannot say that there is no null class; the options stored with them can.
    null_class = _positive(args.get("num_classes")) != rows
    notes = []
    heads = _num_heads(tensors, hidden, "attention" in mixers, args, told["num_heads"])
    options = {
        "sample_size": _sample_size(tensors, patch, args, told["sample_size"], notes),
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": len(mixers),
        "num_heads": heads,
        "mlp_ratio": _ratio(len(tensors["blocks.0.mlp.fc1.weight"]), hidden),
        "num_classes": rows - null_class,
        "class_dropout_prob": 0.1 if null_class else 0.0,
        "learn_sigma": output == 2 * channels * patch * patch,
        "token_mixer": next((name for name in TOKEN_MIXERS if mixer_names(name, len(mixers)) == mixers), mixers),
        "pos_embed": "pos_embed" in tensors,
        **_meaning(args, told, form),
    }
    if "atconv" in mixers:
        options["kernel_size"] = _kernel_size(source, tensors)
        options["activation"] = "silu" if form == "repa" else "gelu_tanh"
    if "attention" in mixers:
        options["qk_norm"] = _has_qk_norm(tensors)
    return options, notes


def build(source: str, tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> SiTTransformer2DModel:
    """The model of those options with copies of the tensors, all in the widest of their dtypes.

    Raises InputError naming the first tensor of another shape, or not made of finite floats.
    """
    with torch.device("meta"):
        model = SiTTransformer2DModel(**options)
    for name, expected in model.state_dict().items():
        tensor = tensors[name]
        if tensor.shape != expected.shape:
            raise _shape_error(source, name, tensor.shape, f"{tuple(expected.shape)} fits the other tensors")
        check_values(source, name, tensor)
    dtype = widest(tensors)
    # Copies, since the file may be mapped into memory.
    state = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in tensors.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def check_values(source: str, name: str, tensor: torch.Tensor) -> None:
    """Raise InputError for whole numbers, floats of another kind than DTYPES, and what is not finite."""
    if tensor.dtype not in DTYPES or not tensor.isfinite().all():
        raise InputError(f"checkpoint {source!r}: {name} ({tensor.dtype}) is not made of finite floats")


def widest(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """The dtype that holds the values of all the tensors."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})


def position_embedding_kind(tensors: dict[str, torch.Tensor], grid: tuple[int, int]) -> str | None:
    """ "sincos" for the fixed embedding of this library, "stored" for any other that a checkpoint brings, or None."""
    stored = tensors.get("pos_embed")
    if stored is None:
        return None
    fixed = sincos_position_embedding(grid, stored.shape[-1])
    # A rounding of the stored dtype, which a checkpoint in half precision went through.
    tolerance = max(1e-6, torch.finfo(stored.dtype).eps)
    return "sincos" if torch.allclose(stored.float(), fixed, rtol=0, atol=tolerance) else "stored"


def _mixers(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The mixer of every block by the names under its `attn`; a block without such names counts as attention."""
    names = [match.groups() for name in tensors if (match := re.match(r"blocks\.(\d+)\.(?:attn\.(\w+))?", name))]
    depth = max((int(index) for index, _ in names), default=0) + 1
    atconv = {int(index) for index, part in names if part in ATCONV_PARTS}
    # A stray index must not make the model deep enough to fill the memory; the blocks between are missing anyway.
    depth = min(depth, len(names) + 1)
    return ["atconv" if index in atconv else "attention" for index in range(depth)]


def _check_names(source: str, tensors: dict[str, torch.Tensor], mixers: list[str]) -> None:
    """Compare with the names of a tiny model of the same blocks."""
    norm = {"qk_norm": True} if "attention" in mixers and _has_qk_norm(tensors) else {}
    with torch.device("meta"):
        tiny = SiTTransformer2DModel(
            sample_size=1, patch_size=1, hidden_size=4, num_heads=1, depth=len(mixers), token_mixer=mixers,
            pos_embed="pos_embed" in tensors, **norm,
        )  # fmt: skip
    expected = tiny.state_dict().keys()
    unexpected = [name for name in tensors if name not in expected]
    missing = [name for name in expected if name not in tensors]
    problems = [
        f"{kind} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for kind, names in (("unexpected", unexpected), ("missing", missing))
        if names
    ]
    if problems:
        raise InputError(f"checkpoint {source!r} is not of the SiT architecture: {'; '.join(problems)}")


def _shape_error(source: str, name: str, shape, rule: str) -> InputError:
    return InputError(
        f"checkpoint {source!r} is not of the SiT architecture: {name} has the shape {tuple(shape)}, {rule}"
    )


def _has_qk_norm(tensors: dict[str, torch.Tensor]) -> bool:
    return any(re.match(r"blocks\.\d+\.attn\.q_norm\.", name) for name in tensors)


def _kernel_size(source: str, tensors: dict[str, torch.Tensor]) -> int:
    name = next(name for name in tensors if re.fullmatch(r"blocks\.\d+\.attn\.kernel_gen\.weight", name))
    taps = len(tensors[name]) if tensors[name].ndim else 0
    size = math.isqrt(taps)
    if size**2 != taps or size % 2 == 0:
        raise _shape_error(source, name, tensors[name].shape, "the square of an odd kernel size is needed")
    return size


def _ratio(rows: int, hidden: int) -> float:
    """The float r with int(hidden * r) == rows."""
    ratio = rows / hidden
    return ratio if int(hidden * ratio) == rows else math.nextafter(ratio, math.inf)


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _num_heads(
    tensors: dict[str, torch.Tensor], hidden: int, attention: bool, args: dict[str, Any], told: int | None
) -> int:
    """The number of heads, which no tensor gives but the norms of queries and keys."""
    if told is not None:
        if not attention:
            raise InputError(f"num_heads={told} would do nothing: no block has attention; leave it out")
        return told
    for name, tensor in tensors.items():
        if name.endswith(".attn.q_norm.weight") and tensor.ndim and hidden % len(tensor) == 0:
            return hidden // len(tensor)
    heads = _positive(args.get("num_heads")) or HEADS.get(hidden)
    if heads is None and attention:
        raise InputError(
            f"the number of attention heads cannot be told from the tensors: hidden_size={hidden} is none of the "
            f"published widths {sorted(HEADS)}; give it with {option('num_heads')}"
        )
    return heads or 1


def _sample_size(
    tensors: dict[str, torch.Tensor], patch: int, args: dict[str, Any], told: int | tuple[int, int] | None, notes: list
) -> int | tuple[int, int]:
    """Latent size: from the position embedding, else told, else from `args`, else 32."""
    written = args.get("input_size")
    if told is None and isinstance(written, list | tuple) and len(written) == 2 and all(map(_positive, written)):
        told = tuple(written)
    sides = (told, told) if isinstance(told, int) else told
    if "pos_embed" in tensors:
        tokens = tensors["pos_embed"].shape[-2] if tensors["pos_embed"].ndim == 3 else 0
        if sides is not None:
            if sides[0] * sides[1] != tokens * patch**2:
                raise InputError(f"sample size {told}: pos_embed has {tokens} positions of {patch} x {patch} pixels")
        elif math.isqrt(tokens) ** 2 != tokens or not tokens:
            raise InputError(
                f"pos_embed has {tokens} positions, which is no square grid; give height and width by "
                f"{option('sample_size')}"
            )
        else:
            return math.isqrt(tokens) * patch
    if sides is not None:
        return sides[0] if sides[0] == sides[1] else tuple(sides)
    for key, factor in (("input_size", 1), ("image_size", VAE_FACTOR), ("resolution", VAE_FACTOR)):
        stored = args.get(key)
        if _positive(stored) and stored % (factor * patch) == 0:
            return stored // factor
    notes.append(
        f"nothing in the checkpoint gives its latent size: {DEFAULT_SAMPLE_SIZE} assumed, where sample_size says none"
    )
    return DEFAULT_SAMPLE_SIZE


def _meaning(args: dict[str, Any], told: dict[str, Any], form: str) -> dict[str, str]:
    """path and prediction: told, else in `args` (SiT's and REPA's words for them), else linear and velocity.

    A DiT has but one meaning: noise, on the path "ddpm".
    """
    if form == "dit":
        for key in ("path", "prediction"):
            if told[key] is not None:
                raise InputError(f"{key}={told[key]!r}: a DiT predicts noise at its own times, 0 to 999; leave it out")
        return {"path": "ddpm", "prediction": "noise"}
    meaning = {}
    for key, name, usual, choices in (
        ("path", "path_type", "linear", PATHS),
        ("prediction", "prediction", "velocity", PREDICTIONS),
    ):
        value = next(value for value in (told[key], args.get(name), usual) if value is not None)
        meaning[key] = PATH_NAMES.get(str(value).lower(), str(value).lower())
        check_choice(key, meaning[key], choices)
    if form == "repa" and meaning["prediction"] != "velocity":
        raise InputError(f"prediction={meaning['prediction']!r}: REPA's time can be reversed for velocities alone")
    return meaning
