"""From uint8 images to features: one call for Inception, DINOv2, the digits' classifier, or a module of one's own.

Each is a `Kind`, and so is what other parts of the package `register`: an extractor that needs a model of this library.
"""

import copy
import importlib
import inspect
import io
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sit_atconv.data.digits import Digits
from sit_atconv.data.images import ONE_CLASS
from sit_atconv.runtime.devices import numerics, resolve_device
from sit_atconv.runtime.errors import InputError, check_choice, named, option, ran_out, said, told
from sit_atconv.runtime.files import sha256
from sit_atconv.runtime.hooks import recorded
from sit_atconv.runtime.processes import local_rank
from sit_atconv.runtime.weights import digest_of
from sit_atconv.scoring import DIGITS, INCEPTION, digits
from sit_atconv.scoring.result import own

INCEPTION_PROTOCOL = f"{INCEPTION}1"
DINOV2 = "vit_large_patch14_dinov2.lvd142m"
DINOV2_SIZE = 224
OWN = re.compile(r"\w+(\.\w+)*:\w+")
Streams = dict[str, torch.Tensor]
NAMED = 3  # class names that a message tells


class Extractor:
    """Features of images, as streams of vectors: {"pool": (B, D), ...}.

    name: short, also of its folder. protocol: what two scores must share to be compared. streams: the dimension of
    each stream by its name; of a module of one's own they are known after its first images. image_shape: (C, H, W)
    where only images of that shape are taken. module: uint8 (B, C, H, W) -> the streams, or the pool alone. about: what
    else `describe` records; of a classifier `class_names`, HELD_OUT, and where they are known `channels` and
    `image_size` [H, W]. spec: what `load_extractor` makes it of again, None where it is not known.

    Runs in eval mode and fp32, without autocast or TF32 (cuDNN's, and that of matrix products), whatever was set, which
    is as it was afterwards; cuDNN takes deterministic algorithms. So equal batches give equal bits on one machine.
    The size of a batch changes features by float rounding alone: about 1e-6 of their scale.
    """

    def __init__(
        self, name: str, protocol: str, module: nn.Module, streams: dict[str, int], device: torch.device,
        image_shape: tuple[int, int, int] | None = None, spec: str | None = None, **about: Any,
    ):  # fmt: skip
        self.spec = spec
        self.name, self.protocol, self.streams, self.device = name, protocol, streams, device
        self.image_shape = image_shape
        self._module = module.eval().requires_grad_(False).to(device)
        self._about = about

    def describe(self) -> dict[str, Any]:
        """What features depend on: name, protocol, digest of the weights, dtype, TF32, what becomes of the pixels."""
        return {"name": self.name, "protocol": self.protocol, "dtype": "float32", "tf32": False, **self._about}

    def check_images(self, name: str, image_shape: tuple[int, int, int]) -> None:
        """Raise InputError where images of `image_shape` (C, H, W) are not for this extractor. name: of the images."""
        if self.image_shape not in (None, tuple(image_shape)):
            raise InputError(
                f"{name} are {tuple(image_shape)}, {self.name} takes {self.image_shape}; choose another extractor"
            )
        channels, size = self._about.get("channels"), self._about.get("image_size")
        if channels == 1 and image_shape[0] != 1:
            raise InputError(
                f"{name} have {image_shape[0]} channels, {self.name} is a classifier of grey images; train one with "
                "data.channels=3, or choose another extractor"
            )
        if size is not None and list(size) != list(image_shape[1:]):
            height, width = image_shape[1:]
            how = f"with data.image_size={height}" if height == width else "on images of that size"
            raise InputError(
                f"{name} are of {pixels_told(image_shape[1:])} px, {self.name} is a classifier of images of "
                f"{pixels_told(size)} px; train one {how}, or choose another extractor"
            )

    def check_classes(self, name: str, class_names: Sequence[str] | None, labels: np.ndarray | None = None) -> None:
        """Raise InputError where images are of other classes than this classifier knows, as far as both are known.

        name: of the images. class_names: theirs, in the order of their ids; numbers from 0 on are no names, and their
        number alone is compared. labels: their ids, (N,).
        """
        own, theirs = self._about.get("class_names"), class_names
        if own is None:
            return
        if theirs is not None and tuple(theirs) == ONE_CLASS:  # of images without classes
            theirs = None
        numbered = any(list(names) == [*map(str, range(len(names)))] for names in (own, theirs or ()))
        if theirs is not None and (len(theirs) != len(own) if numbered else list(theirs) != list(own)):
            strange = sorted({*theirs} ^ {*own})[:NAMED]
            told = f"such as {', '.join(map(repr, strange))}" if strange else "in another order"
            raise InputError(
                f"{name} are of {len(theirs)} classes, and {self.name} is a classifier of {len(own)} others, {told}; "
                "train a classifier of these classes, or choose another extractor"
            )
        if labels is not None and len(labels) and int(labels.max()) >= len(own):
            raise InputError(
                f"{name}: label {int(labels.max())} is beyond the {len(own)} classes of {self.name}; train a "
                "classifier of these classes, or choose another extractor"
            )

    def check_source(self, source: Any) -> None:
        """Raise InputError where the images of a `Source` are of another shape or of other classes than this takes."""
        self.check_images(source.name, source.image_shape)
        self.check_classes(source.name, source.class_names, source.labels)

    def check_same(self, name: str, stated: dict[str, Any]) -> None:
        """Raise InputError where features were made by another extractor. name: of what states it; stated: what
        `describe` gave then."""
        mine, theirs = own(self.describe()), own(stated)
        for key in mine | theirs:
            if mine.get(key) != theirs.get(key):
                raise InputError(
                    f"{name} is of features with {key} {theirs.get(key)!r}, the extractor has {mine.get(key)!r}; state "
                    "the one that made them, or make them anew"
                )

    def __call__(self, pixels: torch.Tensor) -> Streams:
        """fp32 streams (B, D), on the CPU, of uint8 images (B, C, H, W).

        Raises InputError for streams of another form, features that are not finite, where memory does not do, and
        where a module of one's own fails.
        """
        return self.fetch(self.launch(pixels))

    def launch(self, pixels: torch.Tensor) -> Streams:
        """As a call, but on the device, where the work may go on after the return; `fetch` ends it."""
        try:
            with torch.no_grad(), _true_fp32(self.device):
                out = self._module(pixels.to(self.device, non_blocking=True))
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"extractor {self.name}: {len(pixels)} images at once are too many for the memory of {self.device} "
                f"({said(error)}); give a smaller {option('batch')}",
                every_rank=True,
            ) from None
        except Exception as error:  # a module of one's own is anybody's code
            if not kind_of(self.protocol).foreign or ran_out(error):
                raise
            with told(f"extractor {self.spec} failed on images {tuple(pixels.shape[1:])}", Exception, every_rank=True):
                raise
        streams = out if isinstance(out, dict) else {"pool": out}
        for name, values in streams.items():
            fits = isinstance(values, torch.Tensor) and values.is_floating_point() and values.numel()
            if not (fits and values.ndim == 2 and len(values) == len(pixels)):
                found = getattr(values, "dtype", type(values).__name__), tuple(getattr(values, "shape", ()))
                raise InputError(
                    f"extractor {self.name}: of {len(pixels)} images, stream {name!r} is {found[0]} {found[1]}; a "
                    f"float tensor ({len(pixels)}, D) is needed",
                    every_rank=True,
                )
        dimensions = {name: values.shape[1] for name, values in streams.items()}
        if not dimensions or dimensions != (self.streams or dimensions):
            raise InputError(
                f"extractor {self.name} gave {dimensions}{f', after {self.streams}' if self.streams else ''}; give "
                "the same streams for all images",
                every_rank=True,
            )
        self.streams = dimensions
        return streams

    def fetch(self, streams: Streams) -> Streams:
        """The streams on the CPU, in fp32, once they are found to be finite."""
        fetched = {name: values.float().cpu() for name, values in streams.items()}
        for name, values in fetched.items():
            if not values.isfinite().all():
                raise InputError(
                    f"extractor {self.name}: features {name!r} are not finite; check its weights", every_rank=True
                )
        return fetched


@contextmanager
def _true_fp32(device: torch.device) -> Iterator[None]:
    with numerics(deterministic=True), torch.autocast(device.type, enabled=False):
        torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark = True, False
        yield


@dataclass(frozen=True)
class Kind:
    """A kind of extractor.

    name: what a spec begins with. protocol: what its protocols begin with. offered: the metrics in its features, in the
    order of a result. open: (what follows the colon of a spec, the file of weights or None, the device) -> Extractor.
    argument: what may follow the colon, in words, None where nothing may; needed: whether it must.
    weights: whether a file of weights may be given. on_cpu: whether it runs on the CPU unless told.
    foreign: whether its code is the user's, so that whatever it raises is told in one line.
    recorded: (what begins an error, what `Extractor.describe` gave, the spec that was stored, None by earlier versions)
    -> the spec of an extractor that a file states; None where that is the name alone.
    """

    name: str
    protocol: str
    offered: tuple[str, ...]
    open: Callable[[str, str | None, torch.device], Extractor]
    argument: str | None = None
    needed: bool = False
    weights: bool = False
    on_cpu: bool = False
    foreign: bool = False
    recorded: Callable[[str, dict[str, Any], str | None], str] | None = None


KINDS: dict[str, Kind] = {}
MODULE = "module"  # the kind of a spec that begins with no kind's name
ELSEWHERE = {"attnet": "sit_atconv.classification.extractor.ATTNET"}  # kinds that are registered from above


def register(kind: Kind) -> None:
    """Have `load_extractor` know a kind of extractor by its name."""
    KINDS[kind.name] = kind


def parsed(spec: str) -> tuple[Kind, str]:
    """The kind of the extractor that a spec names, and what follows. Raises InputError for a spec that is none."""
    name, _, rest = spec.partition(":")
    _check_registered(spec, name)
    named = KINDS.keys() - {MODULE}
    if name not in named and ("." in name or rest):
        return KINDS[MODULE], spec
    check_choice('extractor (or "package.module:callable")', name, named)
    kind = KINDS[name]
    if rest and kind.argument is None:
        raise InputError(f"extractor={spec!r}: {name} takes no {rest!r}; leave it out")
    if not rest and kind.needed:
        raise InputError(f"extractor={spec!r}: give {name}:{kind.argument}")
    return kind, rest


def load_extractor(spec: str, weights: str | None = None, device: str | torch.device | None = None) -> Extractor:
    """The extractor that `spec` names.

    spec: "inception"; "digits"; "dinov2", or "dinov2:NAME" with a ViT of timm by name or "local-dir:FOLDER", as timm's
    `save_for_hf` writes it; "attnet:RUN" with a run of `sit-atconv classify`, once
    `sit_atconv.classification.extractor.ATTNET` is registered; or "package.module:callable", which gives an nn.Module
    of one's own for uint8 (B, C, H, W) -> (B, D) or a dict of such. That code is run as it is.
    weights: the file of Inception's (default: torch's hub cache). device: default CUDA where there is one (the one of
    this process's local rank), but the CPU for the digits.
    Raises InputError for what is not there or does not fit.
    """
    kind, rest = parsed(spec)
    if weights is not None and not kind.weights:
        raise InputError(f"{option('weights')} belongs to Inception, and the extractor is {spec!r}; leave it out")
    where = device if isinstance(device, torch.device) else resolve_device(device or default_device(spec))
    return kind.open(rest, weights, where)


def kind_of(protocol: str) -> Kind:
    """What an extractor of this protocol is. Raises InputError for a protocol of no kind that is registered."""
    _check_registered(protocol, protocol.partition("-")[0])
    if (kind := next((kind for kind in KINDS.values() if protocol.startswith(kind.protocol)), None)) is None:
        known = ", ".join(f"{kind.protocol}..." for kind in KINDS.values())
        raise InputError(f"extractor protocol {protocol!r} is of no kind that this version knows; these are {known}")
    return kind


def _check_registered(what: str, name: str) -> None:
    """Raise InputError for a kind of extractor that this library has, and that nobody has registered yet."""
    if name in ELSEWHERE and name not in KINDS:
        raise InputError(f"extractor {what!r}: register {ELSEWHERE[name]} first, by {register.__module__}.register")


def check_kept(where: str, about: dict[str, Any], folder: str) -> None:
    """Raise InputError where the folder of the extractor that a file states is no longer there; where, about: as of
    `recorded_spec`."""
    if not Path(folder).is_dir():
        raise InputError(
            f"{where} is of features by {about['name']!r}, which is no longer at {folder!r}; name it with "
            f"{option('extractor')}, or make these features anew"
        )


def recorded_spec(where: str, about: dict[str, Any], spec: str | None) -> str:
    """The spec of the extractor that a file states.

    where: begins an error. about: what `Extractor.describe` gave; spec: what was stored beside it, None by earlier
    versions. A module of one's own is taken where its file is the recorded one, and is the user's and no library's:
    a file of features must not choose what is run. Raises InputError where it is not.
    """
    with named(where):
        kind = kind_of(about["protocol"])
    return kind.name if kind.recorded is None else kind.recorded(where, about, spec)


def _recorded_dinov2(where: str, about: dict[str, Any], spec: str | None) -> str:
    stated = isinstance(spec, str) and spec.startswith("dinov2:")
    if stated and spec.startswith(local := "dinov2:local-dir:"):
        check_kept(where, about, spec.removeprefix(local))
    return spec if stated else f"dinov2:{about['protocol'].removeprefix('dinov2-').rpartition('-')[0]}"


def _recorded_module(where: str, about: dict[str, Any], spec: str | None) -> str:
    own = about["protocol"].removeprefix("module-")
    file = _module_file(own.partition(":")[0]) if OWN.fullmatch(own) else None
    if file is None or about.get("source_sha256") != sha256(file):
        state = "is not on PYTHONPATH" if file is None else "was changed since, or is a library's"
        raise InputError(
            f"{where} is of features by the module {own!r}, whose file {state}; name one with {option('extractor')}"
        )
    return own


def _module_file(name: str) -> Path | None:
    """The source that importing a module would run, found without running anything; None of Python's and libraries'."""
    libraries = tuple(Path(path).resolve() for key, path in sysconfig.get_paths().items() if "lib" in key)
    for entry in sys.path:
        base = Path(entry or ".").joinpath(*name.split("."))
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.is_file():
                return None if any(file.resolve().is_relative_to(library) for library in libraries) else file
    return None


def default_device(spec: str) -> str:
    """Where an extractor runs unless told: CUDA where there is one, the digits' small classifier on the CPU."""
    if parsed(spec)[0].on_cpu or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{local_rank()}"


class _Inception(nn.Module):
    """torch-fidelity's Inception; pool, logits without bias and the map behind sFID in one pass.

    ADM's sFID takes `mixed_6/conv:0` of the TensorFlow graph: the 1x1 branch of Mixed_6d after its ReLU, channels 0 to
    6 at 17 x 17, flattened as TensorFlow keeps it, NHWC.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> Streams:
        with recorded({"branch": self.model.Mixed_6d.branch1x1}) as seen:
            pool, logits = self.model(pixels.expand(-1, 3, -1, -1))
        spatial = seen["branch"][2][:, :7].permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "logits": logits, "spatial": spatial}


def inception_weights(path: str | None) -> Path:
    """The weights file: the one given, else the one in torch's hub cache. Raises InputError when it is not there."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    name = URL_INCEPTION_V3.rpartition("/")[2]
    weights = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / name
    if not weights.is_file():
        raise InputError(
            f"Inception weights {str(weights)!r} are not there; download {URL_INCEPTION_V3} to that place, or give the "
            f"file with {option('weights')}"
        )
    return weights


def _inception(_: str, file: str | None, device: torch.device) -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights = inception_weights(file)
    try:
        # torch-fidelity would unpickle the file without restraint; it gets tensors that were read safely instead.
        safe = io.BytesIO()
        torch.save(torch.load(weights, map_location="cpu", weights_only=True), safe)
        safe.seek(0)
        with torch.random.fork_rng(devices=[]):
            model = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
            )
    except Exception as error:  # bytes of any kind: the restricted unpickler fails in every way there is
        raise InputError(f"Inception weights {str(weights)!r} cannot be read: {said(error)}") from None
    streams = {"pool": 2048, "logits": 1008, "spatial": 2023}
    return Extractor(
        "inception", INCEPTION_PROTOCOL, _Inception(model), streams, device, spec="inception",
        weights_sha256=sha256(weights),
        input="grey repeated to RGB; bilinear to 299 px as TensorFlow 1 does it; (x - 128) / 128",
    )  # fmt: skip


def _digits(_: str, __: None, device: torch.device) -> Extractor:
    classifier, accuracy = copy.deepcopy(digits.train_classifier())
    return Extractor(
        "digits", DIGITS, classifier, {"pool": 64, "logits": 10}, device, (1, 8, 8), "digits",
        weights_sha256=state_digest(classifier), input="x / 255", heldout_accuracy=accuracy,
        heldout_num=len(Digits("test")), heldout_step=None,
    )  # fmt: skip


class _ClassToken(nn.Module):
    """A ViT's class token after the final norm. Pixels are resized (bicubic, antialiased), clamped, standardised."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit
        self.register_buffer("mean", 255 * torch.tensor(vit.pretrained_cfg["mean"]).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(vit.pretrained_cfg["std"]).view(3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        size = (DINOV2_SIZE, DINOV2_SIZE)
        images = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).clamp(0, 255)
        return self.vit.forward_features((images.expand(-1, 3, -1, -1) - self.mean) / self.std)[:, 0]


def _dinov2(stated: str, _: None, device: torch.device) -> Extractor:
    from timm.models.vision_transformer import VisionTransformer

    from sit_atconv.runtime.vit import is_rgb, load_vit

    name = stated or DINOV2
    where = f"extractor 'dinov2:{name}'"
    vit, file = load_vit(name, where, "dinov2:")
    whole = isinstance(vit, VisionTransformer) and is_rgb(vit)
    if not whole or not vit.has_class_token or isinstance(vit.norm, nn.Identity):
        raise InputError(f"{where} is no ViT of RGB images with a normed class token; choose such as {DINOV2}")
    if any(DINOV2_SIZE % side for side in vit.patch_embed.patch_size):
        raise InputError(f"{where}: its patches of {vit.patch_embed.patch_size} do not tile {DINOV2_SIZE} px")
    vit.reset_classifier(0)
    made = vit.pretrained_cfg
    full = ".".join(part for part in (made["architecture"], made.get("tag")) if part)
    mean, std = (", ".join(f"{value:g}" for value in made[key]) for key in ("mean", "std"))
    return Extractor(
        f"dinov2-{full}", f"dinov2-{full}-1", _ClassToken(vit), {"pool": vit.embed_dim}, device,
        spec=f"dinov2:{name}", weights_sha256=sha256(file),
        input=f"bicubic, antialiased, to {DINOV2_SIZE} px, clamped; grey repeated to RGB; mean {mean}; std {std}",
    )  # fmt: skip


def _own(spec: str, _: None, device: torch.device) -> Extractor:
    where = f"extractor={spec!r}"
    if not OWN.fullmatch(spec):
        raise InputError(f"{where}: give package.module:callable")
    name, _, attribute = spec.partition(":")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{where} cannot be imported: {said(error)}; is its folder on PYTHONPATH?") from None
    make: Callable[[], nn.Module] | None = getattr(module, attribute, None)
    if not callable(make):
        raise InputError(f"{where}: {name} has no callable {attribute!r}")
    try:
        network = make()
    except Exception as error:  # it is anybody's code
        raise InputError(
            f"{where}: {attribute}() raised {type(error).__name__}: {said(error)}; it must give an nn.Module, "
            "called without arguments"
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{where} gave a {type(network).__name__}; an nn.Module is needed")
    file = inspect.getsourcefile(module)
    source = sha256(Path(file)) if file else None
    floats = (t for t in network.state_dict().values() if isinstance(t, torch.Tensor) and t.is_floating_point())
    return Extractor(
        spec.replace(":", "-"), f"module-{spec}", network, {}, device, spec=spec,
        weights_sha256=state_digest(network), source_sha256=source, input="uint8, as the module takes it",
        dtype=", ".join(sorted({str(t.dtype)[6:] for t in floats})),
    )  # fmt: skip


def pixels_told(size: Sequence[int]) -> str:
    """Height and width of images in words, as one number where they are square."""
    height, width = size
    return f"{height}" if height == width else f"{width} x {height}"


def state_digest(module: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and values of a module's state, and of the buffers outside it."""
    return digest_of({**dict(module.named_buffers()), **module.state_dict()})


# "fdd" beside Inception is asked for by its name, and is another extractor's.
register(
    Kind(
        "inception", INCEPTION, ("fid", "sfid", "is", "pr", "kid", "nearest"), _inception, weights=True
    )
)  # fmt: skip
register(
    Kind(
        "dinov2", "dinov2-", ("fdd", "pr", "kid", "nearest"), _dinov2, "NAME", recorded=_recorded_dinov2,
    )
)  # fmt: skip
register(
    Kind(
        "digits", "digits-", ("frechet_distance", "is", "pr", "kid", "nearest", "recognised"), _digits, on_cpu=True
    )
)  # fmt: skip
register(
    Kind(
        MODULE, "module-", ("frechet_distance", "is", "pr", "kid", "nearest"), _own, "callable", foreign=True,
        recorded=_recorded_module,
    )
)  # fmt: skip
