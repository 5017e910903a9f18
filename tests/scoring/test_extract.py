"""Folders of features: complete or nothing, the same from any number of processes and after a kill."""

import json
import os
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.__main__ import main as evaluate
from sit_atconv.config import Data
from sit_atconv.data import open_dataset
from sit_atconv.runtime.errors import InputError
from sit_atconv.runtime.files import lock
from sit_atconv.scoring.extract import ahead, default_folder, features_of
from sit_atconv.scoring.extractor import Extractor, load_extractor, state_digest
from sit_atconv.scoring.features import Features
from sit_atconv.scoring.sources import from_arrays, open_source

N = 43
OWN = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(48, 7, generator=generator))

    def forward(self, pixels):
        x = pixels.float().flatten(1)
        return {"pool": x @ self.weight, "logits": x[:, :2]}

class Picky(Own):
    def forward(self, pixels):
        return 1 / (255 * 48 - pixels.float().flatten(1).sum(1, keepdim=True))

class Odd(Own):
    def forward(self, pixels):
        white = bool((pixels == 255).flatten(1).all(1).any())
        return super().forward(pixels)["pool"][:, white:]

class Stopped(Own):
    def forward(self, pixels):
        raise KeyboardInterrupt
"""


@pytest.fixture(autouse=True)
def own(own_module):
    """A small extractor, by its specification."""
    return f"{own_module(OWN)}:Own"


@pytest.fixture
def extractor(own):
    return load_extractor(own)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (N, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def samples(tmp_path, pixels):
    path = tmp_path / "samples.npz"
    np.savez_compressed(path, arr_0=pixels, arr_1=np.arange(N) % 4)
    return path


def expected(extractor, pixels):
    return extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2))


def same_bits(a, b):
    names = sorted(path.name for path in a.glob("shard-*"))
    assert names == sorted(path.name for path in b.glob("shard-*"))
    assert len(names) == 5
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes()
    infos = [json.loads((folder / "features.json").read_text()) for folder in (a, b)]
    assert infos[0] == infos[1]


def extract(samples, out, own, *more):
    evaluate(["extract", str(samples), "--out", str(out), "--extractor", own, "--shard", "10", "--batch", "4", *more])


def test_a_folder_of_features(samples, own, extractor, pixels, tmp_path, capsys):
    extract(samples, tmp_path / "f", own)
    assert "43 images, logits 2, pool 7" in capsys.readouterr().out
    features = Features(tmp_path / "f", verify=True)
    wanted = expected(extractor, pixels)
    assert (features.n, features.streams, features.image_shape) == (N, {"pool": 7, "logits": 2}, (3, 4, 4))
    np.testing.assert_allclose(features.load("pool"), wanted["pool"], rtol=1e-5)
    np.testing.assert_array_equal(features.load("logits"), wanted["logits"])
    np.testing.assert_array_equal(features.labels, np.arange(N) % 4)
    assert features.labels.dtype == np.int64
    parts = list(features.batches("logits"))
    assert [(first, part.shape) for first, part in parts] == [(i, (min(10, N - i), 2)) for i in range(0, N, 10)]
    assert [first for first, _ in features.batches("pool", shards=range(1, len(features), 2))] == [10, 30]
    some = np.array([0, 9, 10, 41, 42])
    np.testing.assert_array_equal(features.load("logits", some), wanted["logits"][some])
    info = features.info
    assert info["class_histogram"] == {"0": 11, "1": 11, "2": 11, "3": 10}
    assert info["source"]["pixels_sha256"] == open_source(samples).digest()
    assert info["extractor"] == extractor.describe()
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [
        ".lock", "features.json", "settings.json", *(f"shard-{i:06d}.safetensors" for i in range(5)),
    ]  # fmt: skip
    with pytest.raises(InputError, match="have no 'spatial'"):
        features.load("spatial")


def test_an_odd_batch_does_not_reach_over_a_shard(samples, own, extractor, pixels, tmp_path):
    seen = []
    extractor._module.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    features = features_of(samples, extractor, shard=10, batch=7, out=tmp_path / "f")
    assert seen == [7, 3] * 4 + [3]
    np.testing.assert_allclose(features.load("pool"), expected(extractor, pixels)["pool"], rtol=1e-5)


def test_what_is_there_is_not_made_again(samples, extractor, tmp_path):
    first = features_of(samples, extractor, shard=10, batch=4)
    assert first.path == default_folder(samples, extractor) == tmp_path / f"samples.features/{extractor.name}"
    times = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    calls = []
    extractor._module.register_forward_hook(lambda *_: calls.append(1))
    features_of(samples, extractor, shard=10, batch=16)  # a batch moves nothing beyond rounding
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == times
    # A shard that is lost or damaged is made anew, and no other.
    want = (first.path / "shard-000003.safetensors").read_bytes()
    for damage in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(want[:-1]),
        lambda path: path.write_bytes(want[:-1] + bytes([want[-1] ^ 1])),
    ):
        damage(first.path / "shard-000003.safetensors")
        calls.clear()
        features_of(samples, extractor, shard=10, batch=4)
        assert len(calls) == 3
        assert (first.path / "shard-000003.safetensors").read_bytes() == want


def test_two_weights_under_one_name_have_features_of_their_own(samples, own, tmp_path, pixels):
    first, second = load_extractor(own), load_extractor(own)
    second._module.weight.data.neg_()
    second._about["weights_sha256"] = state_digest(second._module)
    assert first.name == second.name
    for _ in range(2):  # the second time they are found again
        places = []
        for extractor in (first, second):
            found = features_of(samples, extractor)
            places.append(found.path)
            np.testing.assert_allclose(found.load("pool"), expected(extractor, pixels)["pool"], rtol=1e-5)
            assert found.info["extractor"]["weights_sha256"] == state_digest(extractor._module)
        assert places[0] == tmp_path / "samples.features" / first.name
        assert places[1].parent == places[0].parent != places[1]
        assert places[1].name.startswith(f"{first.name}-")
    with pytest.raises(InputError, match=r"extractor\.weights_sha256"):
        features_of(samples, second, out=places[0])


def test_features_of_earlier_versions_are_gone_on_with(samples, extractor, tmp_path):
    """They did not say how to load their extractor."""
    folder = features_of(samples, extractor, shard=20).path
    for name in ("settings.json", "features.json"):
        stored = json.loads((folder / name).read_text())
        assert stored.pop("extractor_spec") == extractor.spec
        (folder / name).write_text(json.dumps(stored))
    assert features_of(samples, extractor).path == folder
    (folder / "shard-000001.safetensors").unlink()
    calls = []
    extractor._module.register_forward_hook(lambda *_: calls.append(1))
    assert features_of(samples, extractor).n == N
    assert len(calls) == 1


def test_a_moved_folder_takes_its_features_along(extractor, tmp_path, pixels):
    (tmp_path / "a").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"a/{index}.png")
    (tmp_path / "a/manifest.json").write_text(json.dumps({"num": N, "labels": None, "sampler": "euler"}))
    assert features_of(tmp_path / "a", extractor).path == tmp_path / "a/features" / extractor.name
    (tmp_path / "a").rename(tmp_path / "b")
    calls = []
    extractor._module.register_forward_hook(lambda *_: calls.append(1))
    assert features_of(tmp_path / "b", extractor).labels is None
    assert calls == []


def test_features_of_folders_of_classes_are_no_class(own, extractor, tmp_path, pixels):
    """They lie beside it; those that earlier versions put into it are passed over, but no class of that name."""
    train = tmp_path / "train"
    for index, image in enumerate(pixels):
        (train / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(train / "ab"[index % 2] / f"{index}.png")
    data = Data("imagefolder", str(train), image_size=4)
    evaluate(["build-ref", str(train), "--out", str(tmp_path / "ref.npz"), "--extractor", own])
    assert (tmp_path / f"train.features/{extractor.name}/features.json").is_file()
    assert default_folder(train / "a", extractor) == train / "a/features" / extractor.name
    assert open_dataset(data).class_names == ("a", "b")
    shutil.copytree(tmp_path / "train.features", train / "features")
    assert open_dataset(data).class_names == ("a", "b")
    shutil.copy(train / "a/0.png", train / "features")
    assert open_dataset(data).class_names == ("a", "b", "features")


def test_other_settings_are_refused(samples, own, extractor, tmp_path, pixels, fails, capsys):
    out = tmp_path / "f"
    extract(samples, out, own)
    before = {path: path.read_bytes() for path in out.iterdir()}
    np.savez(tmp_path / "other.npz", arr_0=pixels[::-1], arr_1=np.arange(N) % 4)
    np.savez(tmp_path / "labels.npz", arr_0=pixels, arr_1=np.arange(N) // 4)
    np.savez(tmp_path / "few.npz", arr_0=pixels[:-1], arr_1=np.arange(N - 1) % 4)
    (tmp_path / "changed.py").write_text(OWN.replace("manual_seed(0)", "manual_seed(1)"))
    capsys.readouterr()
    for path, spec, more, says in (
        (tmp_path / "other.npz", own, (), "source.pixels_sha256"),
        (tmp_path / "labels.npz", own, (), "labels_sha256"),
        (tmp_path / "few.npz", own, (), "n: 43 -> 42"),
        (samples, "changed:Own", (), "extractor.weights_sha256"),
        (samples, own, ("--shard", "11"), "shard: 10 -> 11"),
    ):
        arguments = "extract", path, "--out", out, "--extractor", spec, "--shard", "10", *more
        message = fails(evaluate, *arguments)
        assert "holds features with other settings" in message
        assert says in message
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    # Another place, or the same images stored otherwise, are the same settings.
    np.savez(tmp_path / "stored.npz", arr_0=pixels, arr_1=np.arange(N) % 4)
    extract(tmp_path / "stored.npz", out, own)


def test_folders_of_something_else_are_refused(samples, own, tmp_path, fails):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/settings.json").write_text("{")
    (tmp_path / "file").touch()
    for name, says in (
        ("full", "holds 'notes.txt' and is no folder of features"), ("damaged", "settings.json is damaged"),
        ("file", "is a file"), ("file/f", "cannot be written"),
    ):  # fmt: skip
        assert says in fails(evaluate, "extract", samples, "--out", tmp_path / name, "--extractor", own)
    for option in ("--batch", "--shard"):
        out = tmp_path / "new"
        assert f"{option} 0: must be at least 1" in fails(
            evaluate, "extract", samples, "--out", out, "--extractor", own, option, 0
        )
        assert not out.exists()


def test_images_that_cannot_be_read_leave_nothing(own, tmp_path, pixels, fails):
    np.savez(tmp_path / "float.npz", arr_0=pixels / 255)
    np.savez(tmp_path / "cut.npz", arr_0=np.tile(pixels, (50, 1, 1, 1)))
    content = bytearray((tmp_path / "cut.npz").read_bytes())
    content[60_000] ^= 1
    (tmp_path / "cut.npz").write_bytes(content)
    for name, says in (("float.npz", "float64"), ("cut.npz", "truncated or damaged"), ("none.npz", "no such file")):
        out = tmp_path / "f"
        assert says in fails(evaluate, "extract", tmp_path / name, "--out", out, "--extractor", own)
        assert not out.exists()
    # The digits' classifier is not for these: found before a byte is written.
    with pytest.raises(InputError, match=r"takes \(1, 8, 8\)"):
        features_of(
            from_arrays(torch.zeros(3, 3, 8, 8, dtype=torch.uint8)),
            Extractor("digits", "x", torch.nn.Flatten(), {}, torch.device("cpu"), (1, 8, 8)),
            out=tmp_path / "f",
        )
    assert not (tmp_path / "f").exists()


def test_features_that_are_not_finite_end_the_extraction(samples, extractor, tmp_path):
    extractor._module.weight.data[3, 2] = torch.inf
    with pytest.raises(InputError, match="'pool' are not finite"):
        features_of(samples, extractor, shard=10, out=tmp_path / "f")
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [".lock", "settings.json"]


def fail(samples, extractor, folder):
    """Begin to extract to a folder, and end with a fault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor._module, "forward", lambda pixels: torch.full((len(pixels), 7), torch.nan))
        extractor.streams = {}
        with pytest.raises(InputError, match="not finite"):
            features_of(samples, extractor, shard=10, batch=4, out=folder)
    extractor.streams = {}


def test_a_folder_that_lost_a_shard_is_not_whole_until_it_is_there_again(samples, extractor, tmp_path):
    folder = features_of(samples, extractor, shard=10, out=tmp_path / "f").path
    (folder / "shard-000001.safetensors").unlink()
    fail(samples, extractor, folder)
    assert not (folder / "features.json").exists()
    features_of(samples, extractor, shard=10, out=folder)
    # Another shard in its place is not it, also where nothing says its digest.
    want = (folder / "shard-000001.safetensors").read_bytes()
    (folder / "shard-000001.safetensors").write_bytes((folder / "shard-000002.safetensors").read_bytes())
    (folder / "features.json").unlink()
    features_of(samples, extractor, shard=10, out=folder)
    assert (folder / "shard-000001.safetensors").read_bytes() == want


def test_images_per_file_are_those_of_the_folder_unless_stated(samples, extractor, tmp_path, capsys):
    folder = features_of(samples, extractor, shard=10, out=tmp_path / "f").path
    capsys.readouterr()
    assert len(features_of(samples, extractor, out=folder)) == 5
    assert capsys.readouterr().err == ""  # and no bar of nothing
    assert len(features_of(samples, extractor, out=tmp_path / "new")) == 1
    with pytest.raises(InputError, match="shard: 10 -> 1000"):
        features_of(samples, extractor, shard=1000, out=folder)
    settings = json.loads((folder / "settings.json").read_text())
    for shard in (0, "10", None):
        (folder / "settings.json").write_text(json.dumps({**settings, "shard": shard}))
        with pytest.raises(InputError, match="images per file; delete it, or choose another"):
            features_of(samples, extractor, out=folder)


def test_a_folder_that_another_run_writes_to_is_left_alone(samples, extractor, tmp_path):
    folder = tmp_path / "f"
    fail(samples, extractor, folder)
    (folder / ".shard-000000.safetensors.0123456789ab.unfinished").write_bytes(b"the other's")
    held, end = os.pipe(), os.pipe()
    if not (pid := os.fork()):
        file = lock(folder, "it")
        os.write(held[1], b"x")
        os.read(end[0], 1)
        file.close()
        os._exit(0)
    os.read(held[0], 1)
    with pytest.raises(InputError, match=r"features folder '.*f' is in use by another process; end that one"):
        features_of(samples, extractor, shard=10, out=folder)
    assert (folder / ".shard-000000.safetensors.0123456789ab.unfinished").exists()
    os.write(end[1], b"x")
    os.waitpid(pid, 0)
    features_of(samples, extractor, shard=10, out=folder)
    assert not (folder / ".shard-000000.safetensors.0123456789ab.unfinished").exists()
    # What is whole is there for any number of readers, on a disk that takes nothing.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sit_atconv.scoring.extract.lock", lambda *_: pytest.fail("took the lock"))
        features_of(samples, extractor, shard=10, out=folder)


def test_an_interrupt_is_no_traceback(samples, own, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        extract(samples, tmp_path / "f", own.replace("Own", "Stopped"))
    assert exit_info.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped; ")


def test_the_digits_are_not_extracted_by_their_name(own, tmp_path, fails):
    message = fails(evaluate, "extract", "digits", "--out", tmp_path / "f", "--extractor", own)
    assert "the embedded digits are a reference to score against" in message


def test_a_damaged_folder_is_not_read(samples, extractor, tmp_path):
    folder = features_of(samples, extractor, shard=10, out=tmp_path / "f").path
    shard, index = folder / "shard-000001.safetensors", folder / "features.json"
    whole = {path: path.read_bytes() for path in (shard, index)}

    def refusal(verify=False):
        with pytest.raises(InputError) as caught:
            Features(folder, verify=verify)
        for path, content in whole.items():
            path.write_bytes(content)
        return str(caught.value)

    shard.write_bytes(whole[shard][:-1])
    assert "shard-000001.safetensors is damaged" in refusal()
    shard.unlink()
    assert "shard-000001.safetensors is damaged" in refusal()
    shard.write_bytes((folder / "shard-000002.safetensors").read_bytes())
    assert "it holds other images or streams" in refusal()
    shard.write_bytes(whole[shard][:-1] + bytes([whole[shard][-1] ^ 1]))
    Features(folder)
    assert "its SHA-256 is not that of features.json" in refusal(verify=True)
    tensors = load_file(shard)
    save_file({**tensors, "labels": tensors["labels"] + 1}, shard)
    assert "class histogram" in refusal()
    save_file({name: tensors[name] for name in ("pool", "logits", "index")}, shard)
    assert "labels are missing" in refusal()
    for text in ("{", "{}", "[]"):
        index.write_text(text)
        assert "features.json is damaged" in refusal()
    info = json.loads(whole[index])
    index.write_text(json.dumps({**info, "shards": {f"../f/{name}": sha for name, sha in info["shards"].items()}}))
    assert "features.json is damaged" in refusal()
    for changed in (
        {"n": "43"}, {"streams": []}, {"streams": {"pool": None}}, {"image_shape": None}, {"image_shape": [3, "4", 4]},
        {"extractor": None}, {"extractor": {}},
        {"extractor": {"name": "own", "protocol": 5}}, {"source": None}, {"source": {}}, {"class_histogram": []},
        {"labels": None}, {"shards": []},
    ):  # fmt: skip
        index.write_text(json.dumps({**info, **changed}))
        assert "features.json is damaged" in refusal(), changed
    index.write_text(json.dumps({**info, "n": 44}))
    assert "hold 43 images, and it says 44" in refusal()
    index.unlink()
    assert "no features.json, so they are not whole" in refusal()


def test_reading_ahead():
    def items(fault=None):
        for number in range(6):
            if number == fault:
                raise InputError("number 3")
            made.append(number)
            yield number

    made = []
    assert list(ahead(items(), 2)) == list(range(6))
    taken = []
    with pytest.raises(InputError, match="number 3"):
        taken.extend(ahead(items(3), 2))
    made = []
    early = ahead(items(), 2)
    assert next(early) == 0
    early.close()
    assert len(made) <= 4


def test_no_more_than_a_few_batches_are_in_memory(extractor, tmp_path):
    """However many there are: counted as they are made and let go."""
    import weakref

    alive, most = weakref.WeakSet(), 0
    source = from_arrays(torch.zeros(400, 3, 4, 4, dtype=torch.uint8))
    original = source.batches

    def batches(*span):
        nonlocal most
        for pixels in original(*span):
            alive.add(pixels)
            most = max(most, len(alive))
            yield pixels

    source.batches = batches
    features_of(source, extractor, shard=40, batch=4, out=tmp_path / "f")
    assert most <= 8


@pytest.fixture(scope="module")
def processes(process_server):
    return partial(process_server, "eval.__main__")


@pytest.fixture
def run(processes, tmp_path):
    """Runs `extract` in one process per number: SIGKILL on itself in place of that shard's name, 0 for none."""

    def runs(samples, out, spec, *kills):
        arguments = ["extract", str(samples), "--out", str(out), "--extractor", spec, "--shard", "10", "--batch", "4"]
        environment = {"environment": {"ACCELERATE_USE_CPU": "true", "OWN": str(tmp_path)}}
        at = [{"at": ["data", kill, "KILL"]} if kill else {} for kill in kills]
        codes, said = processes(tmp_path, arguments, *(environment | each for each in at))
        return codes, "".join(said)

    return runs


@pytest.mark.slow
def test_two_processes_and_a_kill_between_give_the_same_bits(run, own, samples, tmp_path):
    extract(samples, tmp_path / "one", own)
    # One process, killed before its third shard is in place, then gone on with.
    killed = tmp_path / "killed"
    codes, log = run(samples, killed, own, 3)
    assert codes == [-signal.SIGKILL], log
    times = {path: path.stat().st_mtime_ns for path in killed.glob("shard-*.safetensors")}
    assert len(times) == 2
    assert len(list(killed.glob(".*.unfinished"))) == 1
    with pytest.raises(InputError, match="not whole"):
        Features(killed)
    assert run(samples, killed, own, 0)[0] == [0]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert not list(killed.glob(".*.unfinished"))
    same_bits(tmp_path / "one", killed)
    # Two processes; and two, of which one is killed, gone on with by two.
    codes, log = run(samples, tmp_path / "two", own, 0, 0)
    assert codes == [0, 0], log
    assert "features (1 of 2 processes): image 23 of 23, " in log  # of the first process: shards 0, 2 and 4
    same_bits(tmp_path / "one", tmp_path / "two")
    assert -signal.SIGKILL in run(samples, tmp_path / "both", own, 0, 2)[0]
    assert not (tmp_path / "both/features.json").exists()
    assert run(samples, tmp_path / "both", own, 0, 0)[0] == [0, 0]
    same_bits(tmp_path / "one", tmp_path / "both")


def test_a_fault_of_one_process_ends_both_with_one_line(run, own, samples, tmp_path, pixels):
    """Image 10 is white, in the second process's first shard; other settings are found by the first process."""
    pixels[10] = 255
    np.savez(tmp_path / "white.npz", arr_0=pixels)
    codes, log = run(tmp_path / "white.npz", tmp_path / "f", own.replace("Own", "Picky"), 0, 0)
    assert codes == [2, 2], log
    assert log.count("'pool' are not finite") == 1
    assert (tmp_path / "f/shard-000004.safetensors").is_file()
    assert not (tmp_path / "f/features.json").exists()
    codes, log = run(tmp_path / "white.npz", tmp_path / "odd", own.replace("Own", "Odd"), 0, 0)
    assert codes == [2, 2], log
    assert [line for line in log.splitlines() if line.startswith("error: ")] == [
        f"error: extractor {own.replace(':Own', '-Odd')} gave {{'pool': 7}}, after {{'pool': 6}}; give the same "
        "streams for all images"
    ]
    codes, log = run(samples, tmp_path / "f", own.replace("Own", "Picky"), 0, 0)
    assert codes == [2, 2], log
    assert log.count("other settings") == 1
    assert "Traceback" not in log
