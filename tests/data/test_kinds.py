"""Every kind of dataset: the same images are the same tensors, and what is wrong with one is named."""

import gc
import importlib.util
import os
import pickle
import shutil
import struct
import weakref
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from sampled import sampled

from sit_atconv.config import DATA_KINDS, Data
from sit_atconv.data import DATASETS, database, open_dataset
from sit_atconv.data.archive import Zip
from sit_atconv.data.database import Lmdb
from sit_atconv.data.folder import Folder
from sit_atconv.data.held_out import split
from sit_atconv.data.images import Unreadable
from sit_atconv.data.loading import TrainingBatches
from sit_atconv.data.order import Balanced
from sit_atconv.data.samples import RankPositions
from sit_atconv.runtime.errors import InputError

_spec = importlib.util.spec_from_file_location("kinds", Path(__file__).with_name("kinds.py"))
kinds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kinds)


@pytest.fixture(autouse=True)
def local_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    return kinds.write_folder(tmp_path / "images")


def hub_table(folder: Path, label=None) -> datasets.Dataset:
    names = sorted(path.name for path in folder.iterdir())
    columns = {
        "image": [{"bytes": data, "path": None} for data, _ in kinds.records(folder)],
        "label": [label(number) if label else number for _, number in kinds.records(folder)],
    }
    label_type = datasets.Value("string" if label else "int64") if label else datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, datasets.Features(image=datasets.Image(), label=label_type))


def as_parquet(table: datasets.Dataset, root: Path, files: int = 1) -> Path:
    root.mkdir()
    for number in range(files):
        table.shard(files, number, contiguous=True).to_parquet(root / f"train-{number:05d}-of-{files:05d}.parquet")
    return root


def written(kind: str, folder: Path, out: Path) -> Data:
    """The recipe's data section for the folder's images in another form."""
    options = {}
    if kind == "zip":
        root = kinds.write_zip(out / "a.zip", folder)
    elif kind == "zip of a wrapping folder, deflated":
        root = kinds.write_zip(out / "b.zip", folder, zipfile.ZIP_DEFLATED, "data/images/")
    elif kind == "lmdb":
        root = kinds.write_lmdb(out / "lmdb", kinds.records(folder))
        (root / "classes.txt").write_text("cat\ndog\nowl\n")
    elif kind == "lmdb of one file":
        root = kinds.write_lmdb(out / "one.lmdb", kinds.records(folder), protocol=2, subdir=False)
        (out / "classes.txt").write_text("cat\ndog\nowl")
    elif kind == "hf imagefolder":
        root = out / "flat"  # where it takes folders for classes
        for file, label in kinds.images(folder):
            (root / kinds.CLASSES[label]).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / kinds.CLASSES[label])
    elif kind == "hf saved":
        root = out / "saved"
        hub_table(folder).save_to_disk(root)
    elif kind == "hf saved splits":
        root, options = out / "splits", {"split": "held"}
        other = hub_table(folder).select([0])
        datasets.DatasetDict(train=other, held=hub_table(folder)).save_to_disk(root)
    elif kind == "hf parquet":
        table = hub_table(folder).rename_columns({"image": "img", "label": "kind"})
        root, options = as_parquet(table, out / "parquet"), {"image_key": "img", "label_key": "kind"}
    elif kind == "hf of strings and bytes":
        table = hub_table(folder, label=kinds.CLASSES.__getitem__)
        table = table.cast_column("image", datasets.Image(decode=False)).map(lambda row: {"raw": row["image"]["bytes"]})
        root, options = as_parquet(table.remove_columns("image"), out / "bytes"), {"image_key": "raw"}
    return Data(kind=kind.split()[0], root=str(root), image_size=kinds.SIZE, **options)


KINDS = [
    "zip", "zip of a wrapping folder, deflated", "lmdb", "lmdb of one file", "hf imagefolder", "hf saved",
    "hf saved splits", "hf parquet", "hf of strings and bytes",
]  # fmt: skip


def test_every_kind_of_a_recipe_opens():
    assert DATASETS.keys() == set(DATA_KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_are_the_same_tensors(kind, folder, tmp_path):
    expected, dataset = Folder(str(folder), kinds.SIZE), open_dataset(written(kind, folder, tmp_path))
    assert (dataset.channels, dataset.image_size, dataset.moments) == (3, kinds.SIZE, False)
    assert dataset.class_names == expected.class_names == kinds.CLASSES
    assert len(dataset) == len(expected) == 9
    # The builder of folders lists files in an order of its own.
    order = range(9) if kind != "hf imagefolder" else match(dataset, expected)
    assert sorted(order) == list(range(9))
    for index in range(9):
        for flip in (False, True):
            image, label = dataset[order[index], flip]
            assert torch.equal(image, expected[index, flip][0])
            assert type(label) is int
            assert label == expected[index, flip][1] == dataset.labels[order[index]]


@pytest.mark.parametrize("kind", ["npz", *(kind for kind in KINDS if kind != "hf imagefolder")])
def test_every_kind_holds_out_the_same_images(kind, folder, tmp_path):
    whole = Folder(str(folder), kinds.SIZE)
    if kind == "npz":
        pixels = np.stack([whole[index, False][0].permute(1, 2, 0) for index in range(9)])
        np.savez(tmp_path / "a.npz", arr_0=pixels, arr_1=whole.labels)
        data = Data("npz", str(tmp_path / "a.npz"), kinds.SIZE)
    else:
        data = written(kind, folder, tmp_path)
    train, held_out = (pickle.loads(pickle.dumps(part)) for part in split(open_dataset(data), 0.5))
    for part, indices in ((held_out, [1, 4, 6, 8]), (train, [0, 2, 3, 5, 7])):  # every other one of 3, 4 and 2
        assert part.labels.tolist() == whole.labels[indices].tolist()
        for place, index in enumerate(indices):
            assert all(torch.equal(part[place, flip][0], whole[index, flip][0]) for flip in (False, True))
            assert part.picture(place)[1] == whole.labels[index]


def match(dataset, expected) -> list[int]:
    keys = [dataset[index, False][0].numpy().tobytes() for index in range(len(dataset))]
    return [keys.index(expected[index, False][0].numpy().tobytes()) for index in range(len(expected))]


@pytest.mark.parametrize("kind", ["imagefolder", "zip", "lmdb", "hf saved"])
def test_a_dataset_can_be_sent_to_a_process(kind, folder, tmp_path):
    data = Data("imagefolder", str(folder), kinds.SIZE) if kind == "imagefolder" else written(kind, folder, tmp_path)
    dataset = open_dataset(data)
    image = dataset[4, False][0]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[4, False][0], image)


@pytest.mark.parametrize("kind", ["zip", "lmdb", "hf saved", "stream"])
def test_loader_processes_change_nothing(kind, folder, tmp_path):
    if kind == "stream":
        data = stream(as_parquet(hub_table(folder), tmp_path / "p", files=3), num_images=9)
    else:
        data = written(kind, folder, tmp_path)
    dataset, batches = open_dataset(data), []
    dataset[5, False]  # what is open here goes over into the loader processes
    for workers in (0, 2):
        samples = sampled(dataset, (3, 2, 2), 4, seed=1, flip=True)
        batches.append(list(TrainingBatches(samples, RankPositions(0, 5, 4), Data(workers=workers, worker_timeout=60))))
    assert len(batches[0]) == 5
    for plain, loaded in zip(*batches, strict=True):
        assert all(torch.equal(plain[key], loaded[key]) for key in plain)
    labels = torch.cat([batch["label"] for batch in batches[0]])
    assert labels[:9].sort().values.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]  # an epoch


# Folders


def test_folder_leaves_out_what_is_hidden_and_no_image(folder, tmp_path):
    for name in ("cat/.0.png", "cat/notes.txt"):
        (folder / name).write_bytes(b"no image")
    (tmp_path / ".hidden").mkdir()
    folder = folder.rename(tmp_path / ".hidden" / "images")  # hidden above the root is nobody's business
    assert len(Folder(str(folder), kinds.SIZE)) == 9
    assert len(Folder(f"{folder}/", kinds.SIZE)) == 9


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Folder(str(tmp_path / "nowhere"), 16)
    with pytest.raises(InputError, match=str(tmp_path)):
        Folder(str(tmp_path), 16)
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match="holds no images in folders"):
        Folder(str(tmp_path), 16)


@pytest.mark.parametrize("kind", ["imagefolder", "zip"])
def test_an_empty_class_is_named_and_hidden_folders_are_none(folder, tmp_path, kind):
    def opened():
        if kind == "imagefolder":
            return Folder(str(folder), kinds.SIZE)
        return Zip(shutil.make_archive(str(tmp_path / "made"), "zip", tmp_path, folder.name), kinds.SIZE)

    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (folder / hidden).mkdir()
    (folder / ".ipynb_checkpoints" / "0.png").write_bytes(b"no image")
    assert opened().class_names == kinds.CLASSES
    (folder / "bear" / "deeper").mkdir(parents=True)
    (folder / "bear" / "deeper" / "notes.txt").touch()
    (folder / "yak").mkdir()
    with pytest.raises(InputError, match=r"no image in the class folder 'bear', 'yak'; remove it, or bring"):
        opened()


def test_folder_tells_a_lost_image_from_a_lost_dataset(folder, tmp_path):
    dataset = Folder(str(folder), kinds.SIZE)
    (folder / "cat" / "0.png").unlink()
    with pytest.raises(Unreadable, match=r"cat/0\.png' cannot be read \(No such file"):
        dataset[0, False]
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no longer there") as error:
        dataset[1, False]
    assert not isinstance(error.value, Unreadable)
    assert error.value.every_rank


# Archives


def test_zip_names_a_damaged_image_and_reads_the_others(folder, tmp_path):
    file = kinds.write_zip(tmp_path / "a.zip", folder)
    dataset = Zip(str(file), kinds.SIZE)
    content = bytearray(file.read_bytes())
    place = content.find((folder / "dog" / "0.png").read_bytes()) + 60
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(Unreadable, match=r"a\.zip/dog/0\.png' cannot be read \(damaged\)"):
        dataset[3, False]
    assert dataset[4, False][1] == 1
    file.write_bytes(content[: place - 100])
    with pytest.raises(Unreadable, match=r"damaged"):
        Zip.__getitem__(dataset, (3, False))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("form", ["{}", "/{}", "./{}", "../images/{}", "images\\{}"])
def test_zip_takes_names_as_an_unpacker_would(folder, tmp_path, form):
    def entry(name: str) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(form.format(name))
        info.create_system = 0 if "\\" in form else 3
        info.filename = form.format(name).replace("/", "\\") if "\\" in form else info.filename
        return info

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(entry(""), b"")
        archive.writestr(entry("cat/0.png"), b"replaced by what comes later")
        for path, _ in kinds.images(folder):
            archive.writestr(entry(path.relative_to(folder).as_posix()), path.read_bytes())
    dataset, expected = Zip(str(tmp_path / "a.zip"), kinds.SIZE), Folder(str(folder), kinds.SIZE)
    assert dataset.class_names == kinds.CLASSES
    assert dataset.labels.tolist() == expected.labels.tolist()
    assert all(torch.equal(dataset[index, False][0], expected[index, False][0]) for index in range(9))


def test_a_backslash_in_a_name_of_unix_stays(folder, tmp_path):
    (folder / "cat" / "0.png").rename(folder / "cat" / "back\\slash.png")
    dataset = Zip(str(kinds.write_zip(tmp_path / "a.zip", folder)), kinds.SIZE)
    assert dataset.class_names == kinds.CLASSES
    assert any(dataset.name(index).endswith("cat/back\\slash.png") for index in range(9))


@pytest.mark.parametrize("kind", ["imagefolder", "zip"])
def test_names_of_other_scripts_and_suffixes_in_capitals(folder, tmp_path, kind):
    (folder / "owl").rename(folder / "сова")
    for name in ("0.png", "2.webp"):
        (folder / "cat" / name).rename(folder / "cat" / name.upper())
    if kind == "imagefolder":
        dataset = Folder(str(folder), kinds.SIZE)
    else:
        dataset = Zip(str(kinds.write_zip(tmp_path / "a.zip", folder)), kinds.SIZE)
    assert dataset.class_names == ("cat", "dog", "сова")
    assert np.bincount(dataset.labels).tolist() == [3, 4, 2]
    assert "сова" in dataset.name(8)
    assert dataset[8, False][1] == 2


def test_a_class_folder_may_be_a_link(folder, tmp_path):
    expected = Folder(str(folder), kinds.SIZE)[3, False]
    (folder / "dog").rename(tmp_path / "elsewhere")
    (folder / "dog").symlink_to(tmp_path / "elsewhere")
    image, label = Folder(str(folder), kinds.SIZE)[3, False]
    assert torch.equal(image, expected[0])
    assert label == expected[1]


def test_zip_says_when_it_is_gone(folder, tmp_path):
    dataset = Zip(str(kinds.write_zip(tmp_path / "a.zip", folder)), kinds.SIZE)
    (tmp_path / "a.zip").unlink()
    with pytest.raises(Unreadable, match="No such file"):
        dataset[0, False]


def test_files_that_are_no_archive_of_images_are_refused(tmp_path, folder):
    with pytest.raises(InputError, match="No such file"):
        Zip(str(tmp_path / "nowhere.zip"), 16)
    with pytest.raises(InputError, match="Is a directory"):
        Zip(str(folder), 16)
    (tmp_path / "no.zip").write_bytes(b"no archive")
    with pytest.raises(InputError, match="no zip archive"):
        Zip(str(tmp_path / "no.zip"), 16)
    for names in ([], ["0.png", "notes.txt"]):
        with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
            for name in names:
                archive.writestr(name, b"x")
        with pytest.raises(InputError, match="no images in folders"):
            Zip(str(tmp_path / "flat.zip"), 16)
    kinds.write_zip(tmp_path / "rare.zip", folder, zipfile.ZIP_BZIP2)
    with pytest.raises(InputError, match="rare way"):
        Zip(str(tmp_path / "rare.zip"), 16)


def test_an_encrypted_zip_is_refused(folder, tmp_path):
    file = kinds.write_zip(tmp_path / "a.zip", folder)
    content = bytearray(file.read_bytes())
    entry = content.find(b"cat/0.png", content.find(b"PK\1\2")) - 46
    content[entry + 8 : entry + 10] = struct.pack("<H", 1)
    file.write_bytes(content)
    with pytest.raises(InputError, match="encrypted"):
        Zip(str(file), 16)


# LMDBs


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_lmdb_counts_its_classes_where_no_names_are_given(folder, tmp_path, protocol):
    dataset = Lmdb(str(kinds.write_lmdb(tmp_path / "lmdb", kinds.records(folder), protocol)), kinds.SIZE)
    assert dataset.class_names == ("0", "1", "2")
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_lmdb_runs_no_pickle(folder, tmp_path):
    records = kinds.records(folder)
    records[1], records[2] = Evil(tmp_path / "made"), (records[2][0], np.int64(0))
    dataset = Lmdb(str(kinds.write_lmdb(tmp_path / "lmdb", records)), kinds.SIZE)
    assert dataset.labels.tolist() == [0, -1, -1, 1, 1, 1, 1, 2, 2]
    with pytest.raises(Unreadable, match=r"lmdb:1' cannot be read \(it asks for posix\.mkdir"):
        dataset[1, False]
    with pytest.raises(Unreadable, match=r"it asks for numpy\S*scalar.*labels as plain int"):
        dataset[2, False]
    for header in ("__len__", "__keys__"):
        root = kinds.write_lmdb(tmp_path / header, [], **{header: pickle.dumps(Evil(tmp_path / "made"))})
        with pytest.raises(InputError, match=rf"{header} refused, and nothing in it was run: it asks for posix\.mkdir"):
            Lmdb(str(root), kinds.SIZE)
    root = kinds.write_lmdb(tmp_path / "all", [Evil(tmp_path / "made")] * 2)
    with pytest.raises(InputError, match=r"all:0' cannot be read \(it asks for posix\.mkdir"):
        Lmdb(str(root), kinds.SIZE)
    assert not (tmp_path / "made").exists()


def test_every_process_opens_an_lmdb_itself(folder, tmp_path):
    root = str(kinds.write_lmdb(tmp_path / "lmdb", kinds.records(folder)))
    first, second = Lmdb(root, kinds.SIZE), Lmdb(root, kinds.SIZE)  # which LMDB allows only with one handle
    held = database._environment(root)
    child = os.fork()
    if not child:
        status = 1
        try:
            status = int(database._environment(root) is held or first[4, False][1] != 1)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert database._environment(root) is held
    assert first[4, False][1] == second[4, False][1] == 1


def test_an_lmdb_that_is_cut_before_a_process_opens_it_is_a_lost_dataset(folder, tmp_path):
    root = kinds.write_lmdb(tmp_path / "lmdb", kinds.records(folder))
    dataset = Lmdb(str(root), kinds.SIZE)
    database._OPEN.pop(str(root))[1].close()  # as in a process that has not opened it
    os.truncate(root / "data.mdb", (root / "data.mdb").stat().st_size - 1)
    with pytest.raises(InputError, match="is cut") as error:
        dataset[0, False]
    assert not isinstance(error.value, Unreadable)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ((b"x",), "not .image file, label"),
        ("xy", "not .image file, label"),
        (("x", 1), "not the bytes of a file"),
        ((b"x", "1"), "label is '1'"),
        ((b"x", -1), "label is -1"),
        ((b"x", 3), "has the label 3, and there are 3 classes, from 0 on"),
        ((b"x", 1), "does not decode"),
    ],
)
def test_lmdb_names_a_bad_record(folder, tmp_path, record, reason):
    root = kinds.write_lmdb(tmp_path / "lmdb", [*kinds.records(folder), record])
    (root / "classes.txt").write_text("cat\ndog\nowl\n")
    dataset = Lmdb(str(root), kinds.SIZE)
    assert dataset[8, False][1] == 2
    with pytest.raises(Unreadable, match=reason):
        dataset[9, False]
    readable = record == (b"x", 1)  # its label; one beyond the classes is of none of them, wherever they are counted
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 1 if readable else -1]
    assert [part.indices.tolist() for part in split(dataset, 0.5)] == [[0, 2, 3, 5, 7, 9], [1, 4, 6, 8]]
    assert {Balanced(dataset.labels, dataset.class_names, 0).index(place) for place in range(45)} == {
        *range(9 + readable)
    }


def test_lmdb_names_a_missing_record(folder, tmp_path):
    keys = pickle.dumps([b"0", b"lost"])
    root = kinds.write_lmdb(tmp_path / "lmdb", kinds.records(folder), __keys__=keys, __len__=pickle.dumps(2))
    dataset = Lmdb(str(root), kinds.SIZE)
    assert dataset.labels.tolist() == [0, -1]
    with pytest.raises(Unreadable, match=r"lmdb:lost' cannot be read \(it is not there\)"):
        dataset[1, False]


def test_what_is_no_such_lmdb_is_refused(folder, tmp_path):
    def refuse(root: Path, match: str) -> None:
        with pytest.raises(InputError, match=match):
            Lmdb(str(root), kinds.SIZE)

    refuse(tmp_path / "nowhere", "no such LMDB")
    refuse(folder, "no such LMDB")
    (tmp_path / "junk").write_bytes(b"junk" * 5000)
    refuse(tmp_path / "junk", "is no LMDB, or damaged")
    cut = kinds.write_lmdb(tmp_path / "cut", [(bytes(100_000), 1)]) / "data.mdb"
    used = cut.stat().st_size
    os.truncate(cut, used - 4096)
    refuse(cut.parent, f"is cut: {used - 4096:,} bytes of {used:,}")
    refuse(kinds.write_lmdb(tmp_path / "a", [], __keys__=None), "__keys__ is not there")
    refuse(kinds.write_lmdb(tmp_path / "b", []), "__keys__ is not a list of bytes")
    refuse(kinds.write_lmdb(tmp_path / "c", [(b"x", 1)], __len__=pickle.dumps(7)), "__len__ is 7, __keys__ lists 1")
    root = kinds.write_lmdb(tmp_path / "d", [(b"x", 1)])
    (root / "classes.txt").write_text("\n")
    refuse(root, "is empty; write a class name a line")


# Hugging Face datasets


def test_no_bar_is_drawn_off_a_terminal(folder, tmp_path, capsys):
    data, off = written("hf parquet", folder, tmp_path), datasets.are_progress_bars_disabled()
    datasets.enable_progress_bars()  # whatever another test has left
    capsys.readouterr()
    try:
        open_dataset(data)
        assert not datasets.are_progress_bars_disabled()
    finally:
        if off:
            datasets.disable_progress_bars()
    assert "\r" not in capsys.readouterr().err


def test_hub_takes_the_distinct_integers_as_classes(folder, tmp_path):
    labels = [7, 7, 7, 30, 30, 30, 30, 4, 4]
    table = hub_table(folder).remove_columns("label").add_column("label", labels)
    dataset = open_dataset(Data("hf", str(as_parquet(table, tmp_path / "p")), kinds.SIZE))
    assert dataset.class_names == ("4", "7", "30")
    assert dataset.labels.tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert dataset[8, False][1] == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_without_labels_is_one_class(folder, tmp_path, streaming):
    root = as_parquet(hub_table(folder).remove_columns("label"), tmp_path / "p")
    found = open_dataset(Data("hf", str(root), kinds.SIZE, label_key="", streaming=streaming, num_images=9))
    assert (len(found), found.class_names) == (9, ("all",))
    assert [found[index, False][1] for index in range(9)] == [0] * 9


def test_the_subset_and_revision_of_a_hub_dataset_are_asked_for(folder, monkeypatch):
    asked = []

    def load_dataset_builder(*where, revision):
        asked.append((where, revision))
        files = {"held": ["hf://datasets/someone/something@v1/held.parquet"]}
        return SimpleNamespace(
            config=SimpleNamespace(data_files=files),
            download_and_prepare=lambda: None,
            as_dataset=lambda split: asked.append(split) or hub_table(folder),
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    data = Data("hf", "someone/something", kinds.SIZE, subset="fine", revision="v1", split="held")
    assert len(open_dataset(data)) == 9
    assert asked == [(("someone/something", "fine"), "v1"), "held"]


def test_hub_names_a_bad_image(folder, tmp_path):
    values = [{"bytes": kinds.records(folder)[0][0], "path": None}, None, {"bytes": b"x", "path": None}]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a"]))
    datasets.Dataset.from_dict({"image": values, "label": [0] * 3}, features).save_to_disk(tmp_path / "saved")
    dataset = open_dataset(Data("hf", str(tmp_path / "saved"), kinds.SIZE))
    assert dataset[0, False][1] == 0
    for index, reason in ((1, "its record is empty"), (2, r"saved\[train\]\[2\]' does not decode")):
        with pytest.raises(Unreadable, match=reason):
            dataset[index, False]
    dataset = open_dataset(written("hf imagefolder", folder, tmp_path))
    (tmp_path / "flat" / "owl" / "1.jpg").unlink()
    with pytest.raises(Unreadable, match=r"owl/1\.jpg' of '.*\[train\]\[8\]' cannot be read"):
        dataset[8, False]


def test_what_is_no_such_hub_dataset_is_refused(folder, tmp_path):
    root = as_parquet(hub_table(folder), tmp_path / "p")
    unlabelled = hub_table(folder).remove_columns("label").add_column("label", [-1, None, *[2] * 7])
    unlabelled = as_parquet(unlabelled, tmp_path / "u")
    bare = as_parquet(hub_table(folder).remove_columns("label"), tmp_path / "b")
    several = as_parquet(hub_table(folder), tmp_path / "several")
    configurations = "".join(f"- config_name: {name}\n  data_files: '*.parquet'\n" for name in ("fine", "coarse"))
    (several / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
    saved = tmp_path / "s"
    datasets.DatasetDict(a=hub_table(folder)).save_to_disk(saved)
    for options, match in (
        ({"root": str(tmp_path / "nowhere")}, "nowhere.*cannot be opened"),
        ({"root": "someone/something"}, "someone/something.*cannot be opened"),
        ({"root": str(root), "split": "held"}, "data.split=held.*cannot be opened"),
        ({"root": str(saved)}, "data.split='train'.*choose from"),
        ({"root": str(root), "image_key": "img"}, "data.image_key='img'"),
        ({"root": str(root), "label_key": "labels"}, "data.label_key='labels': did you mean 'label'"),
        ({"root": str(root), "image_key": "label"}, "one of images is needed"),
        ({"root": str(unlabelled)}, "for every image"),
        ({"root": str(bare)}, r"has no column 'label', but \['image'\]: name.*, or state data.label_key=''"),
        ({"root": str(several)}, r"data.subset=None, .*'fine', 'coarse'"),
        ({"root": str(several), "subset": "other"}, r"data.subset=other, .*'fine', 'coarse'"),
        ({"root": str(root), "revision": "main"}, "data.revision='main' does nothing for the folder"),
        ({"root": str(saved), "subset": "other"}, "data.subset='other' does nothing for the folder"),
    ):
        with pytest.raises(InputError, match=match):
            open_dataset(Data("hf", image_size=kinds.SIZE, **options))


# Streams


def stream(root: Path, **options) -> Data:
    return Data("hf", str(root), kinds.SIZE, streaming=True, shuffle_buffer=4, **options)


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_a_stream_is_what_shuffle_and_set_epoch_give(folder, tmp_path, form):
    table = hub_table(folder)
    if form == "saved":
        table.save_to_disk(tmp_path / "s")
        data, plain = stream(tmp_path / "s"), datasets.load_from_disk(tmp_path / "s").to_iterable_dataset()
    else:
        root = as_parquet(table, tmp_path / "p", files=3)
        data, plain = stream(root, num_images=9), datasets.load_dataset(str(root), split="train", streaming=True)
    dataset = open_dataset(data)
    assert (len(dataset), dataset.class_names, dataset.in_order) == (9, kinds.CLASSES, True)
    dataset = dataset.shuffled(5)
    expected = {}
    images = Folder(str(folder), kinds.SIZE)
    by_bytes = {data: images[index, True] for index, (data, _) in enumerate(kinds.records(folder))}
    plain = plain.cast_column("image", datasets.Image(decode=False))
    for epoch in (0, 1, 2):
        shuffled = plain.shuffle(seed=5, buffer_size=4)
        shuffled.set_epoch(epoch)
        rows = [by_bytes[row["image"]["bytes"]] for row in shuffled]
        expected |= {epoch * 9 + place: row for place, row in enumerate(rows)}
    assert len({image.numpy().tobytes() for image, _ in list(expected.values())[:9]}) == 9
    orders = [[expected[epoch * 9 + place][0].sum().item() for place in range(9)] for epoch in (0, 1)]
    assert orders[0] != orders[1]
    # Forwards, by leaps, across epochs, a little back, far back, and first of all in the middle of a later epoch.
    for position in (13, 14, 8, 9, 10, 7, 12, 26, 0, 1, 3, 20, 11):
        image, label = dataset[position, True]
        assert torch.equal(image, expected[position][0])
        assert label == expected[position][1]


def test_every_process_walks_a_stream_itself_and_ends_no_walk_of_its_parent(folder, tmp_path):
    """To end a walk waits for its threads, in a child for ever: also where Python frees what the parent let go."""
    dataset = open_dataset(stream(as_parquet(hub_table(folder), tmp_path / "p"), num_images=9))
    expected = [dataset[position, False][1] for position in range(5)]
    enabled = gc.isenabled()
    gc.disable()
    try:
        dropped = dataset.shuffled(1)
        dropped.itself = dropped  # as a walk and its dataset refer to each other
        dropped[0, False]
        walks = [weakref.ref(each._walk) for each in (dataset, dropped)]
        del dropped
        child = os.fork()
        if not child:
            status = 1
            try:
                gc.collect()
                again = [dataset[position, False][1] for position in range(5)]
                kept = [walk() is not None for walk in walks]
                status = int((again, kept) != (expected, [True, True]) or dataset._walk is walks[0]())
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        gc.collect()
        assert dataset._walk is walks[0]()
        assert walks[1]() is None  # here it has ended
    finally:
        if enabled:
            gc.enable()


def test_a_stream_must_know_its_images_and_classes(folder, tmp_path):
    root = as_parquet(hub_table(folder), tmp_path / "p")
    with pytest.raises(InputError, match=r"state data\.num_images"):
        open_dataset(stream(root))
    integers = hub_table(folder).remove_columns("label").add_column("label", [0] * 9)
    with pytest.raises(InputError, match="ClassLabel"):
        open_dataset(stream(as_parquet(integers, tmp_path / "i"), num_images=9))
    short = open_dataset(stream(root, num_images=10))
    with pytest.raises(InputError, match=r"ends after 9 images.*says 10; correct") as error:
        short[9, False]
    assert error.value.every_rank


def test_a_stream_counts_a_bad_image_by_what_it_is(folder, tmp_path):
    table = hub_table(folder).to_dict()
    table["image"][4] = {"bytes": b"no image", "path": None}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(kinds.CLASSES)))
    root = as_parquet(datasets.Dataset.from_dict(table, features), tmp_path / "p")
    dataset, found = open_dataset(stream(root, num_images=9)), []
    for position in range(27):
        try:
            dataset[position, False]
        except Unreadable as error:
            found.append((position // 9, error.image))
    assert [epoch for epoch, _ in found] == [0, 1, 2]
    assert len({image for _, image in found}) == 1
    assert found[0][1] >= 0
