"""Extractors: Inception with random weights against torch-fidelity's own, a tiny ViT, modules of one's own."""

import hashlib
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny_vit import MEAN, STD, WIDTH, save_vit
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from sit_atconv.data.digits import Digits
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.pictures import to_uint8
from sit_atconv.scoring import digits
from sit_atconv.scoring.extractor import (
    DINOV2_SIZE,
    INCEPTION_PROTOCOL,
    KINDS,
    Extractor,
    default_device,
    kind_of,
    load_extractor,
    recorded_spec,
    state_digest,
)


@pytest.fixture(scope="module")
def inception(inception_weights):
    return load_extractor("inception", str(inception_weights))


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 20, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def features(inception, images):
    return inception(images)


class Taps(dict):
    """Outputs of branch1x1 of two blocks, at one more pass of torch-fidelity's own class."""

    def __init__(self, inception_weights, images):
        self.model = FeatureExtractorInceptionV3(
            "x", ["2048", "logits_unbiased", "logits"], feature_extractor_weights_path=inception_weights
        )
        for name in ("Mixed_6d", "Mixed_6e"):
            branch = getattr(self.model, name).branch1x1
            branch.register_forward_hook(lambda module, inputs, output, name=name: self.update({name: output}))
            branch.bn.register_forward_hook(
                lambda module, inputs, output, name=name: self.update({f"{name} before ReLU": output.clone()})
            )
        self.pool, self.logits, self.biased = self.model(images)


@pytest.fixture(scope="module")
def taps(inception_weights, images):
    return Taps(inception_weights, images)


def test_inception_equals_torch_fidelitys_own_in_one_pass(inception, images, features, taps):
    assert inception.streams == {"pool": 2048, "logits": 1008, "spatial": 2023}
    assert {name: tuple(values.shape) for name, values in features.items()} == {
        "pool": (3, 2048), "logits": (3, 1008), "spatial": (3, 2023),
    }  # fmt: skip
    assert {values.dtype for values in features.values()} == {torch.float32}
    assert torch.equal(features["pool"], taps.pool)
    assert torch.equal(features["logits"], taps.logits)
    assert not torch.allclose(features["logits"], taps.biased, rtol=1e-2)
    passes = []
    handle = inception._module.model.register_forward_hook(lambda *_: passes.append(1))
    inception(images[:1])
    handle.remove()
    assert len(passes) == 1


def test_sfid_takes_6d_after_relu_and_nhwc(features, taps):
    branch = taps["Mixed_6d"]
    assert branch.shape == (3, 192, 17, 17)
    spatial = features["spatial"]
    for image in range(3):  # number i is row i // 7 // 17, column i // 7 % 17, channel i % 7
        for place in (0, 1, 7, 118, 119, 1500, 2022):
            row, column, channel = place // 7 // 17, place // 7 % 17, place % 7
            assert spatial[image, place] == branch[image, channel, row, column]
    assert spatial.min() == 0 < spatial.max()  # after the ReLU
    spread = spatial.std()
    for other in (
        branch[:, :7].flatten(1),  # NCHW
        taps["Mixed_6e"][:, :7].permute(0, 2, 3, 1).flatten(1),
        taps["Mixed_6d before ReLU"][:, :7].permute(0, 2, 3, 1).flatten(1),
        branch[:, 1:8].permute(0, 2, 3, 1).flatten(1),
    ):
        assert other.shape == spatial.shape
        assert (other - spatial).abs().max() > spread


def test_a_batchs_size_moves_features_by_rounding_alone(inception, images, features):
    """Calibrated: three passes of one image each differ from one of three by some 1e-7 of the features' scale."""
    again = inception(images)
    alone = [inception(image[None]) for image in images]
    for name, values in features.items():
        assert torch.equal(again[name], values)
        one_by_one = torch.cat([part[name] for part in alone])
        assert (one_by_one - values).abs().max() < 1e-5 * values.abs().max()


def test_memory_layout_does_not_matter(inception, images, features):
    """Sources give (B, C, H, W) in the memory of (B, H, W, C)."""
    turned = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for name, values in inception(turned).items():
        assert torch.equal(values, features[name])


def test_grey_enters_inception_as_three_equal_channels(inception, images):
    grey = images[:1, :1]
    for name, values in inception(grey).items():
        assert torch.equal(values, inception(grey.repeat(1, 3, 1, 1))[name])


class Witness(nn.Module):
    """Sees what holds while an extractor runs."""

    def forward(self, pixels):
        self.seen = (
            torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic, torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(), self.training,
        )  # fmt: skip
        return pixels.float().mean((2, 3))


@pytest.mark.parametrize("precision", ["high", "medium", "highest"])
def test_true_fp32_inside_and_what_was_set_afterwards(precision):
    witness = Witness()
    extractor = Extractor("x", "x-1", witness, {"pool": 3}, torch.device("cpu"))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    try:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = True, False
        with torch.autocast("cpu", torch.bfloat16):
            extractor(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
            assert torch.is_autocast_enabled("cpu")
        assert witness.seen == ("highest", False, False, True, False, False, False)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.deterministic
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = before[1:]


SWITCHES = """
import torch
from torch import nn
from sit_atconv.runtime.devices import FP32_SWITCHES
from sit_atconv.scoring.extractor import Extractor

class Witness(nn.Module):
    def forward(self, pixels):
        self.seen = {switch.fp32_precision for switch in FP32_SWITCHES}
        self.old = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32  # torch's own code asks these
        return pixels.float().mean((2, 3))

backends = torch.backends
for switch in (backends, backends.cudnn, backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.conv):
    for value in ("tf32", "ieee"):
        switch.fp32_precision = value
        before = [each.fp32_precision for each in FP32_SWITCHES]
        extractor = Extractor("x", "x-1", witness := Witness(), {"pool": 3}, torch.device("cpu"))
        extractor(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
        assert witness.seen == {"ieee"}, witness.seen
        assert witness.old == ("highest", False), witness.old
        assert [each.fp32_precision for each in FP32_SWITCHES] == before
"""


def test_true_fp32_whatever_torchs_newer_switches_say(process_server, tmp_path):
    """In a process of its own: torch does not forget that they and the old ones contradicted each other."""
    codes, said = process_server(SWITCHES, tmp_path, [])
    assert codes == [0], said


def test_descriptions_say_what_features_depend_on(inception, inception_weights):
    about = inception.describe()
    assert about["weights_sha256"] == hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    assert {key: about[key] for key in ("name", "protocol", "dtype", "tf32")} == {
        "name": "inception", "protocol": "adm-inception-1", "dtype": "float32", "tf32": False,
    }  # fmt: skip


def test_each_process_of_a_machine_has_its_own_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [default_device(spec) for spec in ("inception", "dinov2", "digits")] == ["cuda:3", "cuda:3", "cpu"]
    monkeypatch.delenv("LOCAL_RANK")
    assert default_device("inception") == "cuda:0"


def test_loading_leaves_the_random_numbers_alone(inception_weights, encoder_folder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for spec, file in (("inception", str(inception_weights)), (f"dinov2:local-dir:{encoder_folder}", None)):
        load_extractor(spec, file)
        assert torch.equal(torch.get_rng_state(), state), spec


def test_missing_inception_weights_say_all(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(InputError) as caught:
        load_extractor("inception")
    message = str(caught.value)
    assert str(tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth") in message
    assert "download https://github.com/toshas/torch-fidelity/" in message
    assert "give the file with weights" in message


class Boom:
    def __reduce__(self):
        return sys.exit, (99,)


def test_weights_that_are_none_are_refused(tmp_path, inception_weights):
    torch.save({"fc.weight": Boom()}, tmp_path / "evil.pth")
    (tmp_path / "cut.pth").write_bytes(inception_weights.read_bytes()[:10_000])
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    for name in ("evil", "cut", "other", "list"):
        with pytest.raises(InputError, match="cannot be read"):
            load_extractor("inception", str(tmp_path / f"{name}.pth"))


def test_features_that_are_not_finite_are_refused(inception_weights, tmp_path, images):
    state = torch.load(inception_weights, weights_only=True)
    state["fc.weight"][3, 5] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(InputError, match="'logits' are not finite"):
        load_extractor("inception", str(tmp_path / "nan.pth"))(images[:1])


@pytest.fixture(scope="module")
def classifier():
    """Trained once, and handed to all that train it."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    made = digits.train_classifier()
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train_classifier", lambda: made)
        yield made


def test_digits_features_are_the_classifiers(classifier):
    extractor = load_extractor("digits")
    classifier, accuracy = classifier
    pixels = to_uint8(Digits("test").images)
    streams = extractor(pixels)
    with torch.no_grad():
        pool = classifier.features(pixels.float() / 255)
        np.testing.assert_array_equal(streams["pool"].numpy(), pool.numpy())
        np.testing.assert_array_equal(streams["logits"].numpy(), classifier.head(pool).numpy())
    assert extractor.streams == {"pool": 64, "logits": 10}
    about = extractor.describe()
    assert about["protocol"] == "digits-classifier-2"
    assert about["heldout_accuracy"] == accuracy >= 0.97
    assert load_extractor("digits").describe() == about
    with pytest.raises(InputError, match=r"images 'x' are \(3, 8, 8\), digits takes \(1, 8, 8\)"):
        extractor.check_images("images 'x'", (3, 8, 8))


def test_dinov2_is_the_class_token_after_the_norm(encoder_folder):
    extractor = load_extractor(f"dinov2:local-dir:{encoder_folder}")
    assert extractor.streams == {"pool": WIDTH}
    assert DINOV2_SIZE == 224  # DINOv2's evaluation, as FD-DINOv2 is published with
    assert extractor.describe()["protocol"] == "dinov2-vit_tiny_patch16_224.made_up-1"
    assert extractor.describe()["weights_sha256"] == (
        hashlib.sha256((encoder_folder / "model.safetensors").read_bytes()).hexdigest()
    )
    # Black and white, which bicubic overshoots: the clamp shows by 2e-3, two images differ by 3e-3, rounding by 1e-6.
    pixels = 255 * np.random.default_rng(0).integers(0, 2, (2, 6, 5, 3), dtype=np.uint8)
    # Pillow's bicubic over floats, channel by channel, is another's code for the same resize.
    resized = np.stack(
        [
            np.stack(
                [
                    Image.fromarray(image[..., c].astype(np.float32)).resize((DINOV2_SIZE,) * 2, Image.BICUBIC)
                    for c in range(3)
                ]
            )
            for image in pixels
        ]
    ).clip(0, 255)
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (MEAN, STD))
    vit = timm.create_model(f"local-dir:{encoder_folder}", pretrained=True, dynamic_img_size=True).eval()
    with torch.no_grad():
        tokens = vit.forward_features(torch.from_numpy((resized / 255 - mean) / std))
    found = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2))["pool"]
    torch.testing.assert_close(found, tokens[:, 0], rtol=0, atol=2e-5)
    assert not torch.allclose(found, tokens[:, 1], atol=1e-2)
    grey = torch.from_numpy(pixels[..., :1]).permute(0, 3, 1, 2)
    torch.testing.assert_close(extractor(grey)["pool"], extractor(grey.repeat(1, 3, 1, 1))["pool"])


def test_dinov2_that_cannot_be_had(tmp_path, encoder_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sit_atconv.runtime.vit.hf_hub_download", offline)
    mean = save_vit(tmp_path / "mean", args={"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 1,
        "num_heads": 2, "class_token": False, "global_pool": "avg"})  # fmt: skip
    odd = save_vit(tmp_path / "odd", args={"img_size": 15, "patch_size": 5, "embed_dim": 12, "depth": 1,
        "num_heads": 2})  # fmt: skip
    (tmp_path / "empty").mkdir()
    for name, says in (
        ("", "https://huggingface.co/timm/vit_large_patch14_dinov2.lvd142m into a folder"),
        (f":local-dir:{tmp_path / 'empty'}", "holds no config.json"),
        (":vit_huge_patch3", r"dinov2:NAME \(or dinov2:local-dir:FOLDER\)"),
        (f":{mean}", "no ViT of RGB images with a normed class token"),
        (f":{odd}", "do not tile 224 px"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            load_extractor(f"dinov2{name}")
        assert "\n" not in str(caught.value)


def offline(*args, **kwargs):
    raise OSError("no network")


OWN = """
import torch
from torch import nn

class Means(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixels):
        return {"pool": self.dropout(self.scale * pixels.float().mean((2, 3))), "logits": pixels.float().amax((2, 3))}

class Extra(Means):
    def get_extra_state(self):
        return {"said": "no tensor"}

class Plain(Means):
    def forward(self, pixels):
        return super().forward(pixels)["pool"]

class Flat(Means):
    def forward(self, pixels):
        return pixels.float().mean()

class Late(Means):
    def forward(self, pixels):
        return pixels.float().flatten(1)

class Twice(Means):
    def forward(self, pixels):
        return pixels.float().mean((2, 3)).repeat(2, 1)

class Few(Means):
    def forward(self, pixels):
        return pixels.float().mean((2, 3))[:1]

class Narrow(Means):
    def forward(self, pixels):
        return pixels.float().mean((2, 3))[:, :0]

class Whole(Means):
    def forward(self, pixels):
        return pixels[:, 0, :, 0]

class Text(Means):
    def forward(self, pixels):
        return {"pool": "x"}

class Empty(Means):
    def forward(self, pixels):
        return {}

class Large(Means):
    def forward(self, pixels):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

def broken():
    raise OSError("no weights\\nhere")

def needs(width):
    return Means()

half = lambda: Means().half()
number, text = 3, lambda: "x"
"""


@pytest.fixture
def own(own_module):
    """A module of the user's own, on the path; its name."""
    return own_module(OWN)


def test_a_module_of_ones_own(own, tmp_path, images):
    extractor = load_extractor(f"{own}:Means")
    streams = extractor(images)
    assert extractor.streams == {"pool": 3, "logits": 3}
    torch.testing.assert_close(streams["pool"], 2 * images.float().mean((2, 3)))
    about = extractor.describe()
    assert about["name"] == f"{own}-Means"
    assert about["protocol"] == f"module-{own}:Means"
    assert about["source_sha256"] == hashlib.sha256((tmp_path / f"{own}.py").read_bytes()).hexdigest()
    assert about["dtype"] == "float32"
    assert load_extractor(f"{own}:half").describe()["dtype"] == "float16"
    assert load_extractor(f"{own}:half").describe()["weights_sha256"] != about["weights_sha256"]
    assert load_extractor(f"{own}:Plain")(images).keys() == {"pool"}
    assert load_extractor(f"{own}:Extra").describe()["dtype"] == "float32"
    for name, found in (
        ("Flat", r"'pool' is torch.float32 \(\)"), ("Twice", r"torch.float32 \(6, 3\)"), ("Few", r"\(1, 3\)"),
        ("Narrow", r"\(3, 0\)"), ("Whole", r"torch.uint8 \(3, 20\)"), ("Text", r"str \(\)"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"{found}; a float tensor \(3, D\) is needed"):
            load_extractor(f"{own}:{name}").launch(images)
    with pytest.raises(InputError, match=r"gave \{\}; give the same streams"):
        load_extractor(f"{own}:Empty")(images)
    with pytest.raises(InputError, match=r"3 images at once are too many .*Tried to allocate.*give a smaller batch"):
        load_extractor(f"{own}:Large")(images)
    late = load_extractor(f"{own}:Late")
    late(images)
    with pytest.raises(InputError, match=r"gave \{'pool': 192\}, after \{'pool': 1440\}"):
        late(images[..., :8, :8])


def test_specs_that_name_nothing(own):
    for spec, says in (
        ("inceptoin", "did you mean 'inception'"),
        ("dino", "dinov2"),
        ("digits:5", "digits takes no '5'"),
        ("nowhere.module:Thing", "cannot be imported"),
        (f"{own}:Nothing", "has no callable 'Nothing'"),
        (f"{own}:number", "has no callable 'number'"),
        (f"{own}:text", "gave a str"),
        (f"{own}:broken", r"broken\(\) raised OSError: no weights; it must give an nn.Module"),
        (f"{own}:needs", r"needs\(\) raised TypeError: .*called without arguments"),
        ("a.b", "give package.module:callable"),
    ):
        with pytest.raises(InputError, match=says):
            load_extractor(spec)
    with pytest.raises(InputError, match="weights belongs to Inception, and the extractor is 'digits'"):
        load_extractor("digits", weights="x.pth")
    with pytest.raises(InputError, match="device='tpu9'"):
        load_extractor(f"{own}:Means", device="tpu9")


def test_what_a_file_states_names_its_extractor_again(encoder_folder, inception_weights, monkeypatch):
    for about, spec, wanted in (
        ({"protocol": INCEPTION_PROTOCOL}, None, "inception"),
        (load_extractor("digits").describe(), None, "digits"),
        ({"protocol": "dinov2-vit_large_patch14_dinov2.lvd142m-1"}, None, "dinov2:vit_large_patch14_dinov2.lvd142m"),
        ({"protocol": "dinov2-a_vit.tag-1"}, "os:abort", "dinov2:a_vit.tag"),
    ):
        assert recorded_spec("x", about, spec) == wanted
    strange = {"name": "y", "protocol": "classifier-1"}
    with pytest.raises(InputError, match="x: extractor protocol 'classifier-1' is of no kind that this version knows"):
        recorded_spec("x", strange, None)
    with monkeypatch.context() as patch:  # which needs a model of this library, and is registered by who has one
        patch.delitem(KINDS, "attnet", raising=False)
        for call in (partial(load_extractor, "attnet:RUN"), partial(kind_of, "attnet-1")):
            with pytest.raises(InputError, match=r"register sit_atconv\.classification\.extractor\.ATTNET first, by"):
                call()
    vit = load_extractor(f"dinov2:local-dir:{encoder_folder}")
    with pytest.raises(InputError, match=r"x is of features by '.*', which is no longer at 'gone'; name it with ext"):
        recorded_spec("x", vit.describe(), "dinov2:local-dir:gone")
    again = load_extractor(recorded_spec("x", vit.describe(), vit.spec))
    assert again.describe() == vit.describe()
    assert load_extractor("inception", str(inception_weights)).spec == "inception"


MIDDLE = torch.tensor([2000])


def test_a_digest_is_of_all_that_a_module_keeps():
    class Kept(nn.Module):
        def __init__(self, stored=1.0, unstored=1.0, extra="a"):
            super().__init__()
            self.extra = extra
            self.register_buffer("stored", torch.tensor(stored))
            self.register_buffer("unstored", torch.tensor([unstored], dtype=torch.bfloat16), persistent=False)

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

    made = [state_digest(Kept(*given)) for given in ((), (), (2.0,), (1.0, 2.0), (1.0, 1.0, "b"))]
    assert made[0] == made[1]
    assert len(set(made)) == 4
    extras = [{"w": torch.arange(4000)}, {"w": torch.arange(4000)}, {"w": torch.arange(4000).index_fill(0, MIDDLE, 0)}]
    first, same, other = (state_digest(Kept(extra=extra)) for extra in extras)
    assert first == same != other  # though they are printed alike


def test_a_module_that_fails_is_told_in_one_line(own_module):
    name = own_module(
        "import torch\n"
        "from torch import nn\n"
        "class Colour(nn.Module):\n"
        "    def forward(self, pixels):\n"
        "        if pixels.shape[1] != 3:\n"
        "            raise RuntimeError('three channels are wanted\\nand more lines')\n"
        "        raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')\n"
    )
    extractor = load_extractor(f"{name}:Colour")
    with pytest.raises(InputError) as caught:
        extractor(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert str(caught.value) == f"extractor {name}:Colour failed on images (1, 8, 8): three channels are wanted"
    with pytest.raises(RuntimeError, match="can't allocate memory"):  # which a command tells in its own way
        extractor(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
