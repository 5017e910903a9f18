"""Data sets that act, or hold what they should not: nothing runs, nothing else is opened, and each is named."""

import importlib.util
import io
import json
import os
import shutil
import socket
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import slowly
from datasets import ClassLabel, Features
from PIL import Image
from sampled import decode
from torchvision.datasets import ImageFolder

from sit_atconv.config import Data, make_recipe
from sit_atconv.data import open_dataset
from sit_atconv.data.database import MOST_CLASSES, Lmdb
from sit_atconv.data.folder import Folder
from sit_atconv.data.hub import _file, _Files
from sit_atconv.data.images import FORMATS, Reader, Unreadable, check_labels, image_files
from sit_atconv.runtime import limits
from sit_atconv.runtime.errors import InputError
from sit_atconv.scoring.sources import open_source
from sit_atconv.training import checkpoint, train

_spec = importlib.util.spec_from_file_location("kinds", Path(__file__).with_name("kinds.py"))
kinds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kinds)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture(autouse=True)
def local_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    return kinds.write_folder(tmp_path / "images")


def encoded(format: str, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(file, format)
    return file.getvalue()


# Formats


def test_no_program_runs_for_an_image(tmp_path, monkeypatch):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/RAN\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "data" / "a").mkdir(parents=True)
    for name in ("a/0.png", "a/1.png"):
        (tmp_path / "data" / name).write_bytes(EPS)
    with pytest.raises(Unreadable, match="no known format: PNG, JPEG"):
        decode(EPS, 8, False, "x.png")
    with pytest.raises(Unreadable, match="no known format"):
        Reader()(EPS, "x.png")
    with pytest.raises(InputError, match="does not decode"):
        open_source(tmp_path / "data")
    assert not (tmp_path / "RAN").exists()


def test_the_formats_that_are_read_are_these():
    for format in FORMATS:
        assert decode(encoded(format), 8, False, "x").shape == (3, 8, 8)
    for format in ("EPS", "ICNS", "PDF", "TGA", "PCX", "DDS", "JPEG2000"):
        with pytest.raises(Unreadable, match="no known format"):
            decode(encoded(format), 8, False, "x")


def test_large_images_are_read_where_a_recipe_allows_them(tmp_path):
    for name in ("a/0.png", "b/0.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encoded("PNG", (40, 30)))
    for most, read in ((1199, False), (1200, True)):
        data = Data("imagefolder", str(tmp_path), 8, max_pixels=most)
        dataset = open_dataset(data)
        for take in (lambda dataset=dataset: dataset[0, False], lambda dataset=dataset: dataset.picture(0)):
            with nullcontext() if read else pytest.raises(Unreadable, match="40 x 30 pixels, and no more than 1,199"):
                take()
    with pytest.raises(InputError, match="max_pixels=1073741824: must be at least 1 and at most 178,956,970"):
        limits.check(Data, asdict(Data("imagefolder", str(tmp_path), 8, max_pixels=1 << 30)), "data.")


# Folders


def test_training_and_scoring_list_the_same_files_through_links(folder, tmp_path):
    store = tmp_path / "store"
    (folder / "dog").rename(store)
    (folder / "dog").symlink_to(store)
    (folder / "cat" / "more").symlink_to(store / "deeper")
    (folder / "owl" / "link.png").symlink_to(store / "0.png")
    expected = [path for path, _ in ImageFolder(str(folder)).samples]
    trained = Folder(str(folder), kinds.SIZE)
    assert [trained.name(index) for index in range(len(trained))] == expected  # the order of torchvision
    assert trained.labels.tolist() == ImageFolder(str(folder)).targets
    scored = tmp_path / "scored"
    shutil.copytree(folder, scored, symlinks=True)
    for path in image_files(scored):
        Path(path).resolve().write_bytes(encoded("PNG"))
    assert open_source(scored, allow_lossy=True).n == len(expected)


def test_links_back_are_not_followed_for_ever(folder):
    before = {str(path.relative_to(folder)) for path, _ in kinds.images(folder)}
    (folder / "cat" / "again").symlink_to(folder / "cat")
    (folder / "cat" / "to_dog").symlink_to(folder / "dog")
    (folder / "dog" / "to_cat").symlink_to(folder / "cat")
    (folder / "owl" / "self").symlink_to("self")
    names = [os.path.relpath(path, folder) for path in image_files(folder)]
    assert len(names) == len(set(names)) == len(Folder(str(folder), kinds.SIZE))
    assert {name for name in names if "to_" not in name} == before
    assert "cat/to_dog/0.png" in names
    assert not [name for name in names if "again" in name or "to_dog/to_cat" in name or "to_cat/to_dog" in name]


def test_what_is_no_file_is_named_and_not_read(folder):
    os.mkfifo(folder / "cat" / "9.png")
    (folder / "dog" / "9.png").symlink_to("/dev/zero")
    (folder / "owl" / "9.png").symlink_to("nowhere")
    dataset = Folder(str(folder), kinds.SIZE)
    named = {}
    for index in range(len(dataset)):
        try:
            dataset[index, False]
        except Unreadable as error:
            named[os.path.relpath(dataset.name(index), folder)] = str(error)
    assert named.keys() == {"cat/9.png", "dog/9.png", "owl/9.png"}
    for name, said in zip(sorted(named), ("it is a FIFO", "it is a device", "No such file"), strict=True):
        assert said in named[name]
        scored = folder.parent / name[:3]
        scored.mkdir()
        (scored / "9.png").symlink_to(folder / name)
        with pytest.raises(InputError) as error:
            open_source(scored)
        assert str(error.value).replace(str(scored / "9.png"), str(folder / name)) == named[name]


def test_scoring_leaves_no_image_out_for_its_suffix(tmp_path):
    (tmp_path / "class").mkdir()
    for name in ("0.png", "1.PNG", "2.ppm", "3.pgm", "4.tif", "5.tiff", "6.bmp"):
        Image.new("RGB", (8, 8)).save(tmp_path / "class" / name)
    assert open_source(tmp_path).n == len(Folder(str(tmp_path), 8)) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8 are Linux's")
def test_classes_named_in_other_bytes_are_trained_and_gone_on_with(tmp_path):
    """Folders of before UTF-8. A manifest with halves of characters could not be read back."""
    for number, name in enumerate((b"caf\xe9", "hibou é".encode(), b"a\nb")):
        folder = os.path.join(os.fsencode(tmp_path), b"images", name)
        os.makedirs(folder)
        for index in range(2):
            with open(os.path.join(folder, b"%d\xe9.png" % index), "wb") as file:
                file.write(encoded("PNG") if number or index else b"no image")
    recipe = {
        "run": {"out": str(tmp_path / "run")},
        "data": {"kind": "imagefolder", "root": str(tmp_path / "images"), "image_size": 8, "max_bad_share": 0.9},
        "model": {"patch_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 1, "token_mixer": "atconv"},
        "train": {"max_steps": 1, "batch_size": 6},
        "preview": {"every": 0},
    }
    assert open_dataset(make_recipe(recipe).data).class_names == ("a\nb", "caf\\udce9", "hibou é")
    first = train(make_recipe(recipe))
    assert json.loads((first / "trainer.json").read_text())["bad"]  # where the name of the image is told
    recipe["train"]["max_steps"] = 2
    assert checkpoint.load_trained(train(make_recipe(recipe), must_resume=True)).manifest["step"] == 2


# Labels


def hub_of(labels: list[int], names=("a", "b")) -> datasets.Dataset:
    values = {"image": [{"bytes": encoded("PNG"), "path": None}] * len(labels), "label": [0] * len(labels)}
    features = Features(image=datasets.Image(), label=ClassLabel(names=list(names)))
    table = datasets.Dataset.from_dict(values, features).data.table
    # Labels that are no classes: from_dict would not take them.
    return datasets.Dataset(table.set_column(1, table.schema.field("label"), [labels]))


@pytest.mark.parametrize("label", [0, 1, 2, 5, -1, 1 << 40])
@pytest.mark.parametrize("form", ["saved", "parquet", "stream"])
def test_labels_of_a_hub_dataset_are_classes(label, form, tmp_path):
    table = hub_of([0, 1, label, 0])
    if form == "saved":
        table.save_to_disk(tmp_path / "d")
    else:
        (tmp_path / "d").mkdir()
        table.to_parquet(tmp_path / "d" / "train.parquet")
    options = {"streaming": True, "shuffle_buffer": 1, "num_images": 4} if form == "stream" else {}
    data, refused = Data("hf", str(tmp_path / "d"), 8, **options), f"has the label {label}.* there are 2 classes"
    with nullcontext() if label in (0, 1) else pytest.raises(InputError, match=refused):
        dataset = open_dataset(data)
        assert sorted(dataset[index, False][1] for index in range(4)) == sorted([0, 1, label, 0])


def test_both_ends_of_labels_are_checked():
    check_labels("x", np.array([0, 1, 2]), ("a", "b", "c"))
    for labels in ([0, 3], [3, 0], [-1, 0], [0, 1, 1 << 60]):
        with pytest.raises(InputError, match=r"x: image \d has the label"):
            check_labels("x", np.array(labels), ("a", "b", "c"))


@pytest.mark.parametrize("label", [MOST_CLASSES, (1 << 31) - 1, 1 << 31, 1 << 80])
def test_a_label_of_lmdb_makes_no_classes_without_bound(label, folder, tmp_path):
    root = kinds.write_lmdb(tmp_path / "lmdb", [*kinds.records(folder), (encoded("PNG"), label)])
    dataset = Lmdb(str(root), kinds.SIZE)
    assert dataset.class_names == ("0", "1", "2")
    with pytest.raises(Unreadable, match=f"its label is {str(label)[:20]}, not an integer from 0 to"):
        dataset[9, False]


# Hugging Face


def test_a_record_names_files_of_the_dataset_alone(tmp_path, monkeypatch):
    import fsspec

    opened = []
    monkeypatch.setattr(fsspec, "open", lambda path, mode: opened.append(path) or io.BytesIO(b"read"))
    root, other = tmp_path / "root", tmp_path / "root2"
    for each in (root, other):
        each.mkdir()
        (each / "x.png").write_bytes(b"read")
    local, hub = _Files.of(str(root)), _Files.of("user/name")
    good = [
        (local, f"{root}/x.png"), (local, f"zip://x.png::{root}/a.zip"), (hub, "hf://datasets/user/name@abc/x.png"),
        (hub, "zip://x.png::hf://datasets/user/name/a.zip"), (hub, f"{datasets.config.DOWNLOADED_DATASETS_PATH}/x"),
    ]  # fmt: skip
    assert all(files.has(path) for files, path in good)
    bad = [
        "ftp://h/x", "http://h/x", "https://h/x", "s3://b/x", "zip://x.png::/etc/passwd", "/etc/passwd",
        f"{root}/../root2/x.png", f"{other}/x.png", f"file://{root}/x.png", f"local://{root}/x.png", "x.png", "",
        "reference://x", "hf://datasets/user/name2@a/x", "hf://datasets/user/name/../other/x", "hf://datasets/user/name",
        "hf://user/name/x",
        f"simplecache::{root}/x.png", f"filecache::http://h/x::{root}/x.png", "zip://x::http://h/a.zip",
        f"reference://x::{root}/x.png", f"zip://x.png::zip://y.zip::http://h/{root}", f"{root}",
    ]  # fmt: skip
    for path in bad:
        for files in (local, hub, _Files()):
            if path in (str(root), "hf://datasets/user/name/../other/x") and files is local:
                continue
            with pytest.raises(Unreadable, match=r"is no file of the dataset, and is not opened"):
                _file({"bytes": None, "path": path}, "x", files)
    assert opened == []
    assert _file({"bytes": None, "path": f"{root}/x.png"}, "x", local) == b"read"
    assert _file({"bytes": None, "path": good[1][1]}, "x", local) == b"read"
    assert opened == [good[1][1]]


@pytest.fixture
def port():
    """A port of this machine, to which nobody comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server.getsockname()[1]
        with pytest.raises(BlockingIOError):
            server.accept()


def configs(*named, key: str = "data_files") -> str:
    return "---\n" + json.dumps({"configs": [{"config_name": "a", key: each} for each in named]}) + "\n---\n"


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_local_dataset_names_its_own_files_alone(name, tmp_path, port, monkeypatch):
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root / "part", other):
        folder.mkdir(parents=True)
        hub_of([0, 1]).to_parquet(folder / "train.parquet")

    monkeypatch.setattr(datasets, "load_dataset_builder", None)  # nothing is asked of it

    def told(text: str) -> str:
        (root / name).write_text(text if name == "README.md" else text.strip("-\n"))
        with pytest.raises(InputError, match=f"{name} names") as error:
            open_dataset(Data("hf", str(root), 8))
        return str(error.value)

    for place in (
        f"http://127.0.0.1:{port}/x.parquet", f"https://127.0.0.1:{port}/*.parquet", f"ftp://127.0.0.1:{port}/x.parquet",
        f"zip://x.parquet::http://127.0.0.1:{port}/a.zip", "s3://bucket/x.parquet", "hf://datasets/a/b/x.parquet",
        f"{other}/train.parquet", f"file://{other}/train.parquet", "../other/train.parquet", "part/../../other/*",
        "simplecache::part/train.parquet", "/etc/*",
    ):  # fmt: skip
        of_split = [{"split": "train", "path": place}], [{"split": "train", "path": ["part/*", place]}]
        for form in (place, ["part/*", place], *of_split):
            assert "is no file of the dataset, and is not opened" in told(configs(form))
            told(configs("part/*", form))  # of a configuration that is not asked for
    for folder in ("..", "/etc", str(other)):
        told(configs(folder, key="data_dir"))


@pytest.mark.parametrize(
    "named", ["part/*.parquet", "part/train.parquet", [{"split": "train", "path": ["part/*"]}], "**"]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_dataset_may_name_its_files(named, streaming, tmp_path):
    (tmp_path / "d" / "part").mkdir(parents=True)
    hub_of([0, 1]).to_parquet(tmp_path / "d" / "part" / "train.parquet")
    (tmp_path / "d" / "README.md").write_text(configs(named))
    options = {"streaming": True, "num_images": 2} if streaming else {}
    assert len(open_dataset(Data("hf", str(tmp_path / "d"), 8, **options))) == 2


def test_what_a_dataset_consists_of_is_looked_at_once_more(tmp_path, monkeypatch):
    """Of a repository, whose card is not here, and where a pattern leads elsewhere."""
    for path in ("https://elsewhere/x.parquet", "hf://datasets/another/one@main/x.parquet", "/etc/x.parquet"):
        builder = SimpleNamespace(config=SimpleNamespace(data_files={"split": [path]}))
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda *where, builder=builder, **options: builder)
        with pytest.raises(InputError, match=r"consists of .*, which is no file of the dataset"):
            open_dataset(Data("hf", "someone/something", 8))


def test_a_saved_dataset_names_its_own_files_alone(tmp_path):
    table = hub_of([0, 1])
    for name in ("d", "other"):
        datasets.DatasetDict(train=table).save_to_disk(tmp_path / name)
    state, splits = tmp_path / "d/train/state.json", tmp_path / "d/dataset_dict.json"
    before = json.loads(state.read_text())
    for file in (
        f"{tmp_path}/other/train/data-00000-of-00001.arrow",
        "../../other/train/data-00000-of-00001.arrow",
        "..",
    ):
        state.write_text(json.dumps({**before, "_data_files": [{"filename": file}]}))
        with pytest.raises(InputError, match=r"state\.json.*must be the path of a file below the folder"):
            open_dataset(Data("hf", str(tmp_path / "d"), 8))
    state.write_text(json.dumps(before))
    for name in ("../other/train", f"{tmp_path}/other/train", "..", "http://x/y"):
        splits.write_text(json.dumps({"splits": [name]}))
        with pytest.raises(InputError, match=r"dataset_dict\.json.*must be the name of a file"):
            open_dataset(Data("hf", str(tmp_path / "d"), 8))
    splits.write_text('{"splits": ["train"]}')
    assert len(open_dataset(Data("hf", str(tmp_path / "d"), 8))) == 2


DEEP, *OTHERS = (
    "[" * 100_000, "---\n" + "[" * 100_000 + "\n---\n", f"---\nconfigs: [{'a, ' * 100_001}]\n---\n",
    "---\na: &a [*a]\n---",
    "---\na: !!python/object:os.system x\n---\n", f"---\na: {'x' * (1 << 20)}\n---\n",
    "---\na: 1\n" + " " * ((1 << 20) - 13) + "\n---x\nconfigs: 1\n---\n",
)  # fmt: skip
DESCRIPTIONS = ("README.md", ".huggingface.yaml", "dataset_infos.json", "state.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, DEEP) for name in DESCRIPTIONS), *(("README.md", text) for text in OTHERS),
        *slowly([(name, text) for name in DESCRIPTIONS[1:] for text in OTHERS]),
    ],
)  # fmt: skip
def test_a_description_of_a_dataset_is_bounded(name, text, tmp_path):
    hub_of([0, 1]).to_parquet(tmp_path / "train.parquet")
    (tmp_path / name).write_text(text)
    if name == "README.md" and not text.startswith("---"):
        assert len(open_dataset(Data("hf", str(tmp_path), 8))) == 2
        return
    with pytest.raises(InputError, match=rf"{name} cannot be read: .*; mend it") as error:
        open_dataset(Data("hf", str(tmp_path), 8))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("value", [None, 5, [], {}, "..", {"a": []}])
def test_a_description_of_any_content_is_refused_in_one_line(value, tmp_path):
    hub_of([0, 1]).save_to_disk(tmp_path / "d")
    for name in ("state.json", "dataset_info.json"):
        before = json.loads((tmp_path / "d" / name).read_text())
        for key in before:
            (tmp_path / "d" / name).write_text(json.dumps({**before, key: value}))
            with suppress(InputError):
                assert len(open_dataset(Data("hf", str(tmp_path / "d"), 8))) == 2
        (tmp_path / "d" / name).write_text(json.dumps(before))


def test_a_description_that_is_no_file_is_not_waited_for(tmp_path):
    hub_of([0, 1]).to_parquet(tmp_path / "train.parquet")
    for name in (".huggingface.yaml", "README.md", "state.json"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match=rf"{name} cannot be read: .*it is a FIFO"):
            open_dataset(Data("hf", str(tmp_path), 8))
        (tmp_path / name).unlink()


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", None])
def test_a_dataset_saved_with_a_format_is_read_all_the_same(kind, tmp_path):
    hub_of([0, 1]).with_format(kind).save_to_disk(tmp_path / "d")
    dataset = open_dataset(Data("hf", str(tmp_path / "d"), 8))
    assert [dataset[index, False][1] for index in range(2)] == [0, 1]


def test_names_of_classes_can_be_stored(tmp_path):
    (tmp_path / "d").mkdir()
    hub_of([0, 1], names=["a\0", "b"]).to_parquet(tmp_path / "d" / "train.parquet")
    assert open_dataset(Data("hf", str(tmp_path / "d"), 8)).class_names == ("a\\x00", "b")


def test_images_of_a_local_dataset_are_still_read(folder, tmp_path, monkeypatch):
    for file in folder.glob("*/deeper/*"):
        file.rename(file.parents[1] / file.name)
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(folder)
    expected = Folder(str(folder), kinds.SIZE)
    for root in (str(folder), "images", "link", "images/../link"):
        dataset = open_dataset(Data("hf", root, kinds.SIZE))
        assert all(torch.equal(dataset[index, False][0], expected[index, False][0]) for index in range(9))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["dataset", "splits"])
@pytest.mark.parametrize(
    ("split", "places"),
    [
        (None, range(10)), ("train", range(10)), ("train[:2]", range(2)), ("train[80%:]", (8, 9)),
        ("train[:1]+train[8:]", (0, 8, 9)), ("validation", None), ("valid[:2]", None), ("train[", None), ("", None),
    ],
)  # fmt: skip
def test_the_split_of_a_saved_dataset_is_honoured_or_refused(split, places, form, streaming, tmp_path):
    table = hub_of(list(range(10)), names=[str(number) for number in range(10)])
    (table if form == "dataset" else datasets.DatasetDict(train=table, test=table)).save_to_disk(tmp_path / "d")
    options = {"streaming": True, "shuffle_buffer": 1} if streaming else {}
    data = Data("hf", str(tmp_path / "d"), 8, split=split, **options)
    if places is None and split:
        with pytest.raises(InputError, match=r"data\.split='.*choose from"):
            open_dataset(data)
        return
    dataset = open_dataset(data)
    read = [dataset[index, False][1] for index in range(len(dataset))]
    assert sorted(read) == list(places or range(10))
    assert torch.is_tensor(dataset[0, False][0])
