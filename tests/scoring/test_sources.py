"""Images from every place they may lie: the same pixels, the same digest; and what is refused."""

import hashlib
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sit_atconv.runtime.errors import InputError
from sit_atconv.scoring.features import is_features
from sit_atconv.scoring.sources import class_histogram, from_arrays, open_source

N, SHAPE = 23, (6, 5, 3)  # H, W, C


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (N, *SHAPE), dtype=np.uint8)


@pytest.fixture
def labels():
    return np.arange(N) % 3


def write_folder(folder, pixels, labels=None, suffix=".png", **manifest):
    folder.mkdir(exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(folder / f"{index:06d}{suffix}")
    stated = None if labels is None else np.asarray(labels).tolist()
    (folder / "manifest.json").write_text(json.dumps({"num": len(pixels), "labels": stated, **manifest}))
    return folder


def read(source, size=4, **span):
    return torch.cat(list(source.batches(size=size, **span)))


def refusal(path, **options):
    """The message that opening it, or reading all of it, ends in."""
    with pytest.raises(InputError) as caught:
        open_source(path, **options).digest()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=["stored", "deflated", "folder", "folder npz", "arrays", "plain folder"])
def source(request, pixels, labels, tmp_path):
    match request.param:
        case "stored":
            np.savez(tmp_path / "a.npz", arr_0=pixels, arr_1=labels)
            return open_source(tmp_path / "a.npz")
        case "deflated":
            np.savez_compressed(tmp_path / "a.npz", arr_0=pixels, arr_1=labels)
            return open_source(tmp_path / "a.npz")
        case "folder":
            return open_source(write_folder(tmp_path / "a", pixels, labels, image_shape=[3, 6, 5]))
        case "folder npz":
            write_folder(tmp_path / "a", pixels, labels)
            for file in (tmp_path / "a").glob("*.png"):
                file.unlink()
            np.savez(tmp_path / "a/samples.npz", arr_0=pixels, arr_1=labels)
            return open_source(tmp_path / "a")
        case "arrays":
            return from_arrays(torch.from_numpy(pixels).permute(0, 3, 1, 2), labels)
        case "plain folder":
            for index, image in enumerate(pixels):  # in the order of their paths
                (tmp_path / "a" / f"class {index // 10}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(tmp_path / "a" / f"class {index // 10}/{index}.png".replace("/", "/x0", 1))
            source = open_source(tmp_path / "a")
            assert source.labels is None
            return source


def test_the_same_images_wherever_they_lie(source, pixels, labels, request):
    plain = request.node.callspec.params["source"] == "plain folder"
    if plain:
        order = sorted(range(N), key=lambda index: f"class {index // 10}/x0{index}.png")
        pixels = pixels[order]
    assert (source.n, source.image_shape) == (N, (3, 6, 5))
    wanted = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    assert torch.equal(read(source), wanted)
    # In any order of reading, and after the digest, which reads all.
    for start, stop in ((7, 12), (0, 3), (3, 4), (20, N), (5, 5)):
        parts = list(source.batches(start, stop, 2))
        assert [len(part) for part in parts] == [2] * ((stop - start) // 2) + [1] * ((stop - start) % 2)
        assert not parts or torch.equal(torch.cat(parts), wanted[start:stop])
        assert source.digest() == hashlib.sha256(pixels.tobytes()).hexdigest()
    if not plain:
        assert source.labels.dtype == np.int64
        np.testing.assert_array_equal(source.labels, labels)
        assert class_histogram(source.labels) == {"0": 8, "1": 8, "2": 7}


def test_grey_images_have_one_channel(tmp_path, pixels):
    write_folder(tmp_path / "grey", pixels[..., :1], None)
    np.savez(tmp_path / "grey.npz", arr_0=pixels[..., :1])
    folder, npz = open_source(tmp_path / "grey"), open_source(tmp_path / "grey.npz")
    assert folder.image_shape == npz.image_shape == (1, 6, 5)
    assert folder.digest() == npz.digest()
    assert torch.equal(read(folder), read(npz))


def test_a_compressed_npz_is_read_once_from_shard_to_shard(tmp_path, pixels, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", arr_0=pixels)
    source = open_source(tmp_path / "a.npz")
    opened = []
    original = zipfile.ZipFile.open
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *args, **kw: opened.append(1) or original(*args, **kw))
    parts = [read(source, start=start, stop=start + 4) for start in (0, 4, 12, 16)]
    assert torch.equal(parts[2][0], torch.from_numpy(pixels[12]).permute(2, 0, 1))
    assert len(opened) == 1
    read(source, start=0, stop=1)
    assert len(opened) == 2


def test_the_description_identifies_pixels_labels_and_manifest(tmp_path, pixels, labels):
    write_folder(tmp_path / "a", pixels, labels, sampler="euler")
    about = open_source(tmp_path / "a").describe()
    assert about["manifest"] == {"num": N, "sampler": "euler"}
    assert about["manifest_sha256"] == hashlib.sha256((tmp_path / "a/manifest.json").read_bytes()).hexdigest()
    assert about["pixels_sha256"] == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert about["labels_sha256"] == hashlib.sha256(labels.astype(np.int64).tobytes()).hexdigest()
    assert about["lossy"] is False
    # Also where the npz of a samples folder is given itself.
    np.savez(tmp_path / "a/samples.npz", arr_0=pixels, arr_1=labels)
    assert open_source(tmp_path / "a/samples.npz").manifest["sampler"] == "euler"


def test_truncated_and_damaged_npz(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (N, 40, 40, 3), dtype=np.uint8)
    for compressed, save in ((False, np.savez), (True, np.savez_compressed)):
        save(tmp_path / "a.npz", arr_0=pixels)
        content = (tmp_path / "a.npz").read_bytes()
        (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
        assert "cannot be read" in refusal(tmp_path / "cut.npz")
        middle = len(content) // 2
        (tmp_path / "flipped.npz").write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert "truncated or damaged" in refusal(tmp_path / "flipped.npz")
        # A .npy that promises more images than it has, in a zip that is whole.
        header = ("{'descr': '|u1', 'fortran_order': False, 'shape': (99, 40, 40, 3), }".ljust(117) + "\n").encode()
        npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pixels.tobytes()
        with zipfile.ZipFile(tmp_path / "short.npz", "w", 8 if compressed else 0) as archive:
            archive.writestr("arr_0.npy", npy)
        assert "is truncated: arr_0 holds fewer bytes than (99, 40, 40, 3)" in refusal(tmp_path / "short.npz")
    # One that is cut after it was opened.
    np.savez(tmp_path / "a.npz", arr_0=pixels)
    source = open_source(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(content[:900])
    with pytest.raises(InputError, match="truncated or damaged"):
        read(source)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"arr_0": np.zeros((3, 4, 4, 3), np.float32)}, "arr_0 is float32 (3, 4, 4, 3)"),
        ({"arr_0": np.full((3, 4, 4, 3), np.nan)}, "arr_0 is float64"),
        ({"arr_0": np.zeros((3, 4, 4), np.uint8)}, "arr_0 is uint8 (3, 4, 4)"),
        ({"arr_0": np.zeros((3, 3, 4, 4), np.uint8)}, "with 1 or 3 channels"),
        ({"arr_0": np.asfortranarray(np.zeros((3, 4, 4, 3), np.uint8))}, "in Fortran order"),
        ({"arr_0": np.zeros((1, 4, 4, 3), np.uint8)}, "1 image make"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "give at least 2"),
        ({"x": np.zeros((3, 4, 4, 3), np.uint8)}, "arr_0"),
        ({"arr_0": np.zeros((3, 4, 4, 3), np.uint8), "arr_1": np.zeros(2, int)}, "3 images but labels of shape (2,)"),
        ({"arr_0": np.zeros((3, 4, 4, 3), np.uint8), "arr_1": np.zeros(3)}, "labels must be integers, not float64"),
        ({"arr_0": np.zeros((3, 4, 4, 3), np.uint8), "arr_1": np.array(list("abc"))}, "labels must be integers"),
        ({"arr_0": np.zeros((3, 4, 4, 3), np.uint8), "arr_1": np.array([0, -1, 2])}, "label -1 is below 0"),
        (
            {"arr_0": np.zeros((3, 4, 4, 3), np.uint8), "arr_1": np.array([0, None, 2])},
            "labels must be integers, not object",
        ),
    ],
)
def test_npz_of_other_things(arrays, says, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    assert says in refusal(tmp_path / "a.npz")


def test_arrays_of_other_things():
    for pixels, says in (
        (torch.zeros(3, 3, 4, 4), "float32"),
        (torch.full((3, 3, 4, 4), torch.nan), "float32"),
        (torch.zeros(3, 4, 4, 3, dtype=torch.uint8), "1 or 3 channels"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "at least 2"),
    ):
        with pytest.raises(InputError, match=says):
            from_arrays(pixels)


def test_samples_that_are_unfinished_are_none(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    for index in range(3):
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / f"{index:06d}.png")
    with pytest.raises(InputError, match="holds unfinished samples; run the command that began them again"):
        open_source(tmp_path)


def test_folders_that_do_not_fit_their_manifest(tmp_path, pixels, labels):
    folder = write_folder(tmp_path / "a", pixels, labels)
    (folder / "000007.png").rename(folder / "000099.png")
    message = refusal(folder)
    assert "23 images, but its manifest says 23: index 7 is missing" in message
    (folder / "000099.png").unlink()
    assert "22 images, but its manifest says 23: index 7 is missing" in refusal(folder)
    Image.fromarray(pixels[7]).save(folder / "7.png")
    assert open_source(folder).n == N
    Image.fromarray(pixels[7]).save(folder / "07.png")
    assert "index 7 is there twice, 07.png and 7.png" in refusal(folder)
    (folder / "07.png").rename(folder / "seven.png")
    assert "'seven.png' is no index" in refusal(folder)
    (folder / "seven.png").rename(folder / "23.png")
    assert "24 images, but its manifest says 23: index 23 is beyond" in refusal(folder)
    (folder / "23.png").unlink()
    (folder / "7.png").unlink()
    assert "labels of shape (22,)" in refusal(write_folder(folder, pixels, labels[:-1]))
    assert "images of shape (3, 6, 5), but its manifest says (3, 5, 6)" in refusal(
        write_folder(folder, pixels, labels, image_shape=[3, 5, 6])
    )
    for text in ("{", "[]", '{"num": "3", "labels": null}', '{"num": 23, "labels": 5}'):
        (folder / "manifest.json").write_text(text)
        assert "is not the manifest of samples" in refusal(folder)
    (folder / "manifest.json").unlink()
    np.savez(folder / "samples.npz", arr_0=pixels)
    assert "samples.npz without manifest.json is unfinished" in refusal(folder)
    write_folder(folder, pixels, labels)
    np.savez(folder / "samples.npz", arr_0=pixels[:-1])
    assert "22 images, but its manifest says 23" in refusal(folder)
    np.savez(folder / "samples.npz", arr_0=pixels, arr_1=labels[::-1])
    assert "arr_1 and the manifest's labels differ" in refusal(folder)


def test_image_files_of_other_kinds(tmp_path, pixels):
    def folder(name, image, **options):
        write_folder(tmp_path / name, pixels[:3])
        image.save(tmp_path / name / "000001.png", **options)
        return tmp_path / name

    rgb = Image.fromarray(pixels[0])
    for name, image, says in (
        ("grey alpha", rgb.convert("LA"), "000001.png' is 5 x 6 grey, 000000.png is 5 x 6 RGB"),
        ("bits", rgb.convert("1"), "000001.png' is 5 x 6 grey, 000000.png is 5 x 6 RGB"),
        ("deep", Image.fromarray(np.zeros((6, 5), np.uint16)), "is 5 x 6 grey, 000000.png is 5 x 6 RGB"),
        ("grey", rgb.convert("L"), "000001.png' is 5 x 6 grey, 000000.png is 5 x 6 RGB"),
        ("size", rgb.resize((4, 6)), "000001.png' is 4 x 6 RGB, 000000.png is 5 x 6 RGB"),
        ("range", Image.fromarray(np.zeros((6, 5), np.float32)), "its pixels are floats, which have no white"),
    ):
        form = "TIFF" if image.mode == "F" else "PNG"
        assert says in refusal(folder(name, image, format=form))
        assert says in refusal(folder(name, image, format=form), allow_lossy=True)
    for name, image in (("palette", rgb.convert("P")), ("alpha", rgb.convert("RGBA"))):
        assert open_source(folder(name, image)).n == 3
    damaged = write_folder(tmp_path / "damaged", pixels[:3])
    content = (damaged / "000001.png").read_bytes()
    for broken in (b"", b"no image", content[: len(content) // 2]):
        (damaged / "000001.png").write_bytes(broken)
        assert "000001.png' does not decode" in refusal(damaged)
    write_folder(tmp_path / "lone", pixels[:1])
    assert "give at least 2" in refusal(tmp_path / "lone")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refusal(tmp_path / "empty")
    assert "no such file or folder" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(("suffix", "kind"), [(".jpg", "JPEG"), (".webp", "WEBP"), (".png", "JPEG")])
def test_lossy_images_are_let_in_by_request_alone(suffix, kind, tmp_path, pixels):
    write_folder(tmp_path / "a", pixels[:3])
    (tmp_path / "a/000001.png").unlink()
    Image.fromarray(pixels[1]).save(tmp_path / f"a/000001{suffix}", kind)
    message = refusal(tmp_path / "a")
    assert f"000001{suffix}' is {kind}, which moves the scores; give PNGs, or allow_lossy=True" in message
    allowed = open_source(tmp_path / "a", allow_lossy=True)
    assert allowed.describe()["lossy"] is True
    with Image.open(tmp_path / f"a/000001{suffix}") as image:
        assert torch.equal(read(allowed)[1].permute(1, 2, 0), torch.from_numpy(np.array(image)))


def test_large_archives_have_zip64_headers(tmp_path, pixels):
    """As a writer makes them that does not know the size beforehand."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        with archive.open("arr_1.npy", "w", force_zip64=True) as file:
            np.save(file, np.arange(N))
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.save(file, pixels)
    source = open_source(tmp_path / "a.npz")
    assert torch.equal(read(source), torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert source.labels[-1] == N - 1


def test_indices_are_numbers_however_they_are_written(tmp_path, pixels):
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    (tmp_path / "manifest.json").write_text(json.dumps({"num": N, "labels": None}))
    assert torch.equal(read(open_source(tmp_path)), torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_hidden_files_are_no_images(tmp_path, pixels):
    folder = write_folder(tmp_path / "a", pixels)
    (folder / ".000003.png").write_bytes(b"of the system's own")
    assert open_source(folder).n == N
    (folder / "manifest.json").unlink()
    (folder / ".trash").mkdir()
    (folder / "000003.png").rename(folder / ".trash/000003.png")
    assert open_source(folder).n == N - 1
    # A folder above that is hidden hides nothing.
    folder.rename(tmp_path / ".a")
    assert open_source(tmp_path / ".a").n == N - 1


def test_manifests_and_labels_of_odd_values(tmp_path, pixels):
    folder = write_folder(tmp_path / "a", pixels)
    for shape in (5, "abc", [3, 6], [3, "6", 5], {}):
        (folder / "manifest.json").write_text(json.dumps({"num": N, "labels": None, "image_shape": shape}))
        assert "is not the manifest of samples" in refusal(folder)
    np.savez(tmp_path / "a.npz", arr_0=pixels, arr_1=np.full(N, 2**63, np.uint64))
    assert "label 9223372036854775808 is beyond int64" in refusal(tmp_path / "a.npz")


def test_a_folder_that_was_begun_is_called_what_it_is(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"num": 5}))
    assert "holds unfinished samples" in refusal(tmp_path)
    assert not is_features(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"extractor": {}}))
    assert "holds features; give the images" in refusal(tmp_path)
    assert is_features(tmp_path)
    for text in ("[]", "{"):
        (tmp_path / "settings.json").write_text(text)
        assert not is_features(tmp_path)
