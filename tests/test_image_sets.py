"""CIFAR-100 and TinyImageNet: what get_data.py accepts, refuses, and leaves on the disk. Small archives stand in."""

import hashlib
import io
import os
import pickle
import signal
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import get_data
from dataloaders import archives, cifar100, image_sets, omniglot, tinyimagenet

ROOT = Path(__file__).parent.parent
CIFAR_CLASSES = [f"class{i:02d}" for i in range(100)]
WNIDS = [f"n{i:08d}" for i in range(200)]


def pixels(name: str, side: int) -> np.ndarray:
    """An image that is made of its name."""
    rng = np.random.default_rng(list(name.encode()))
    return rng.integers(0, 256, (side, side, 3), dtype=np.uint8)


def encoded(array: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **({"lossless": True} if form == "WEBP" else {}))
    return buffer.getvalue()


def cifar_images(split: str) -> list[tuple[int, np.ndarray]]:
    """Label and pixels [3, 32, 32] of every image of a part of the small CIFAR, as counted in cifar100.COUNTS."""
    names = [(k, f"{split}{name}{i}") for k, name in enumerate(CIFAR_CLASSES) for i in range(cifar100.COUNTS[split])]
    return [(k, pixels(name, 32).transpose(2, 0, 1)) for k, name in names]


def cifar_members() -> dict[str, bytes]:
    """Two training images and one test image of each class."""
    return {
        f"cifar100/{split}/{name}/{name}_{i}.webp": encoded(pixels(f"{split}{name}{i}", 32), "WEBP")
        for split, n in (("train", 2), ("test", 1))
        for name in CIFAR_CLASSES
        for i in range(n)
    }


def tiny_members(per_class: int = 1) -> dict[str, bytes]:
    """Some training images and one validation image of each class; some are greyscale."""
    found = {"tiny-imagenet-200/wnids.txt": "\n".join(reversed(WNIDS)).encode()}
    lines = []
    for k, wnid in enumerate(WNIDS):
        for i in range(per_class):
            image = pixels(f"{wnid}{i}", 64)
            name = f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{i}.JPEG"
            found[name] = encoded(image[:, :, 0] if k == 3 else image, "JPEG")
        found[f"tiny-imagenet-200/val/images/val_{k}.JPEG"] = encoded(pixels(f"val{wnid}", 64), "JPEG")
        lines.append(f"val_{k}.JPEG\t{wnid}\t0\t0\t63\t63")
    found["tiny-imagenet-200/val/val_annotations.txt"] = "\n".join(lines).encode()
    return found


def zipped(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture
def small(monkeypatch):
    """The counts of the small archives, and the digest of what is in the small CIFAR."""
    monkeypatch.setattr(cifar100, "COUNTS", {"train": 2, "test": 1})
    monkeypatch.setattr(tinyimagenet, "TEST_COUNT", 1)
    monkeypatch.setattr(omniglot, "CHARACTERS", {"train": 3, "test": 2})
    monkeypatch.setattr(omniglot, "DRAWINGS", 2)
    digest = hashlib.sha256()
    for split in cifar100.COUNTS:
        labels, images = zip(*cifar_images(split), strict=True)
        for part in cifar100._in_order(np.stack(images), np.array(labels)):
            digest.update(np.ascontiguousarray(part))
    monkeypatch.setattr(cifar100, "CONTENT_SHA256", digest.hexdigest())


def fetch(name: str, tmp_path: Path) -> Path:
    get_data.main([name, "--source", str(tmp_path), "--data_path", str(tmp_path / "data")])
    return tmp_path / "data" / name


def refused(name: str, tmp_path: Path, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        fetch(name, tmp_path)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("get_data.py: ") and message.count("\n") == 1, message
    assert not list((tmp_path / "data").glob("*")), "something was left behind"
    return message


def test_cifar_comes_in_whole_and_sorted_by_class(small, tmp_path, capsys):
    members = cifar_members()
    zipped(tmp_path / "cifar100.zip", members)
    fetch("cifar100", tmp_path)
    found, _ = cifar100.load(tmp_path / "data")
    assert found.classes == CIFAR_CLASSES
    assert found.images["train"].shape == (200, 3, 32, 32) and found.images["train"].dtype == torch.uint8
    assert found.labels["train"].tolist() == [k for k in range(100) for _ in range(2)]
    expected = {pixels(f"train{CIFAR_CLASSES[7]}{i}", 32).transpose(2, 0, 1).tobytes() for i in range(2)}
    assert {found.images["train"][i].numpy().tobytes() for i in (14, 15)} == expected
    get_data.main(["cifar100", "--data_path", str(tmp_path / "data")])
    assert "already" in capsys.readouterr().out


def test_the_original_archive_gives_the_very_same_arrays(small, tmp_path, monkeypatch, capsys):
    """In another order, as a tar file of pickles."""
    zipped(tmp_path / "cifar100.zip", cifar_members())
    fetch("cifar100", tmp_path)
    from_zip, _ = cifar100.load(tmp_path / "data")
    rng, packed = np.random.default_rng(0), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        parts = {"meta": {"fine_label_names": CIFAR_CLASSES}}
        for split in cifar100.COUNTS:
            rows = cifar_images(split)
            rows = [rows[i] for i in rng.permutation(len(rows))]
            parts[split] = {"data": np.stack([x.ravel() for _, x in rows]), "fine_labels": [k for k, _ in rows]}
        for name, content in parts.items():
            data = pickle.dumps(content, protocol=2)
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    other = tmp_path / "other"
    other.mkdir()
    (other / cifar100.ARCHIVE).write_bytes(packed.getvalue())
    assert "not the original" in refused("cifar100", other, capsys)
    monkeypatch.setattr(cifar100, "ARCHIVE_MD5", hashlib.md5(packed.getvalue()).hexdigest())
    fetch("cifar100", other)
    from_tar, _ = cifar100.load(other / "data")
    for split in image_sets.SPLITS:
        assert torch.equal(from_tar.images[split], from_zip.images[split])
        assert torch.equal(from_tar.labels[split], from_zip.labels[split])
    assert from_tar.fingerprint == from_zip.fingerprint


@pytest.mark.parametrize("per_class", [1, 3])
def test_tinyimagenet_takes_any_number_of_training_images_and_greyscale_ones(per_class, small, tmp_path):
    zipped(tmp_path / "tiny-imagenet-200.zip", tiny_members(per_class))
    fetch("tinyimagenet", tmp_path)
    found, _ = tinyimagenet.load(tmp_path / "data")
    assert found.classes == WNIDS and found.images["train"].shape == (200 * per_class, 3, 64, 64)
    grey = found.images["train"][3 * per_class]
    assert torch.equal(grey[0], grey[1]) and not torch.equal(found.images["train"][0][0], found.images["train"][0][1])
    assert found.labels["test"].tolist() == list(range(200))


def _without(part):
    return lambda members: {name: content for name, content in members.items() if part not in name}


CIFAR_FAULTS = [
    (_without("train/class07/"), "train part has 99 classes"),
    (_without("test/class07/"), "class class07 is in one of its train and test parts only"),
    (_without("/class07/"), "train part has 99 classes"),
    (_without("class07_1.webp"), "class07 has 1 train images, expected 2"),
    (lambda m: {**m, "cifar100/train/class07/class07_1.webp": b"no image"}, "class07_1.webp is no readable image)"),
    (lambda m: {**m, "cifar100/train/class07/class07_1.webp": encoded(pixels("x", 16))}, "16 x 16 pixels"),
    (lambda m: {**m, "cifar100/train/class07/class07_1.webp": encoded(pixels("x", 32))}, "not CIFAR-100's"),
    (lambda m: {**m, "../escaped.txt": b""}, "outside the folder"),
    (lambda m: {**m, "/etc/escaped.txt": b""}, "outside the folder"),
    (lambda m: {**m, "a/../../escaped.txt": b""}, "outside the folder"),
    (lambda m: {**m, "cifar100/bomb": bytes(archives.LARGEST_MEMBER + 1)}, "would unpack to"),
]


@pytest.mark.parametrize(("damage", "said"), CIFAR_FAULTS)
def test_a_cifar_archive_that_is_not_as_it_should_be_is_refused(damage, said, small, tmp_path, capsys):
    zipped(tmp_path / "cifar100.zip", damage(cifar_members()))
    assert said in refused("cifar100", tmp_path, capsys)
    assert not list(tmp_path.parent.glob("escaped*"))


TINY_FAULTS = [
    (_without("wnids.txt"), "wnids.txt"),
    (_without("val_annotations"), "val_annotations.txt"),
    (_without("/train/"), "no training images"),
    (_without(f"{WNIDS[5]}_1.JPEG"), f"{WNIDS[5]} has 1 training images, others 2"),
    (_without(f"train/{WNIDS[5]}/"), f"{WNIDS[5]} has 0 training images"),
    (
        lambda m: {**m, f"tiny-imagenet-200/train/{WNIDS[5]}/images/x_9.JPEG": b""},
        f"{WNIDS[5]} has 3 training images, others 2",
    ),
    (lambda m: {**m, "tiny-imagenet-200/train/n77777777/images/x_0.JPEG": b""}, "'n77777777', which wnids.txt has not"),
    (_without("val_9.JPEG"), "val_9.JPEG"),
    (lambda m: {**m, "tiny-imagenet-200/val/val_annotations.txt": b"val_0.JPEG\tnosuch"}, "nosuch"),
    (lambda m: {**m, "tiny-imagenet-200/wnids.txt": b"n1 n2"}, "names 2 classes"),
    (lambda m: {**m, (key := "tiny-imagenet-200/wnids.txt"): m[key].replace(b"n00000007", b"n00000008")}, "names 199"),
    (lambda m: {**m, (key := "tiny-imagenet-200/val/val_annotations.txt"): m[key] + b"\n" + m[key]}, "twice"),
]


@pytest.mark.parametrize(("damage", "said"), TINY_FAULTS)
def test_a_tinyimagenet_archive_that_is_not_as_it_should_be_is_refused(damage, said, small, tmp_path, capsys):
    zipped(tmp_path / "tiny-imagenet-200.zip", damage(tiny_members(2)))
    assert said in refused("tinyimagenet", tmp_path, capsys)


@pytest.mark.parametrize("name", ["cifar100", "tinyimagenet"])
def test_a_file_that_is_no_archive_and_a_folder_without_one(name, tmp_path, capsys):
    assert "--source" in refused(name, tmp_path, capsys)
    (tmp_path / ("cifar100.zip" if name == "cifar100" else "tiny-imagenet-200.zip")).write_bytes(b"PK no zip")
    assert "no readable zip file" in refused(name, tmp_path, capsys)


@pytest.mark.parametrize("fault", ["deflate", "encrypted", "version", "name"])
def test_zip_files_that_python_cannot_read_are_refused(fault, small, tmp_path, capsys):
    path = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in tiny_members(2).items():
            archive.writestr(name, content)
        first = archive.getinfo("tiny-imagenet-200/wnids.txt")
        start = first.header_offset + 30 + len(first.filename)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")  # the first entry of the central directory: that of wnids.txt
    if fault == "deflate":
        content[start : start + 4] = b"\xff\xff\xff\xff"
    elif fault == "encrypted":
        content[first.header_offset + 6] |= 1
        content[entry + 8] |= 1
    elif fault == "version":
        content[entry + 6] = 99
    else:
        content[entry + 9] |= 8  # names are UTF-8
        content[entry + 46] = 0xFF
    path.write_bytes(bytes(content))
    assert "cannot be imported" in refused("tinyimagenet", tmp_path, capsys)


def test_a_pickle_that_asks_for_more_than_arrays_is_refused(tmp_path, monkeypatch, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        data = pickle.dumps({"fine_label_names": Evil()})
        member = tarfile.TarInfo("cifar-100-python/meta")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    (tmp_path / cifar100.ARCHIVE).write_bytes(packed.getvalue())
    monkeypatch.setattr(cifar100, "ARCHIVE_MD5", hashlib.md5(packed.getvalue()).hexdigest())
    assert "could run code" in refused("cifar100", tmp_path, capsys)
    assert not (tmp_path / "sprung").exists()


def test_the_complete_tinyimagenet_comes_first_and_the_folder_of_the_published_lines_finds_it(small, tmp_path, capsys):
    zipped(tmp_path / "tiny-imagenet-200-more.zip", tiny_members(1))
    zipped(tmp_path / "tiny-imagenet-200.zip", tiny_members(2))
    fetch("tinyimagenet", tmp_path)
    assert "(tiny-imagenet-200.zip, 2 training images of each class)" in capsys.readouterr().out
    assert len(tinyimagenet.load(tmp_path / "data" / "tiny-imagenet-200")[0].images["train"]) == 400


def test_a_download_of_tinyimagenet_is_complete_or_refused(small, tmp_path, monkeypatch, capsys):
    zipped(tmp_path / "tiny.zip", tiny_members(2))
    content = (tmp_path / "tiny.zip").read_bytes()
    monkeypatch.setattr(tinyimagenet, "download", lambda *_: content)
    argv = ["tinyimagenet", "--data_path", str(tmp_path / "data")]
    with pytest.raises(SystemExit):
        get_data.main(argv)
    assert "has 2 training images, expected 500" in capsys.readouterr().err
    assert not list((tmp_path / "data").glob("*"))
    monkeypatch.setattr(tinyimagenet, "COMPLETE", 2)
    get_data.main(argv)
    assert tinyimagenet.is_present(tmp_path / "data")


def test_an_import_that_is_told_to_stop_leaves_nothing(small, tmp_path, monkeypatch):
    zipped(tmp_path / "cifar100.zip", cifar_members())
    monkeypatch.setattr(image_sets.np, "save", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        fetch("cifar100", tmp_path)
    assert stop.value.code == 143 and not list((tmp_path / "data").glob("*"))


def test_two_imports_at_once_leave_each_other_alone(tmp_path):
    """A leftover of a process that was killed is removed, but not what a process that runs is writing."""
    arrays = {split: (np.zeros((4, 1, 2, 2), np.uint8), np.arange(4)) for split in image_sets.SPLITS}
    (tmp_path / ".partial-killed-set").mkdir()
    began, go_on = threading.Event(), threading.Event()

    def slow(path, array, save=np.save):
        began.set()
        go_on.wait(10)
        save(path, array)

    writers = [threading.Thread(target=image_sets.write, args=(tmp_path / "set", ["a"], arrays)) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_sets.np, "save", slow)
        writers[0].start()
        assert began.wait(10)
    writers[1].start()
    writers[1].join(0.2)
    assert writers[1].is_alive(), "it waits for the first"
    go_on.set()
    for writer in writers:
        writer.join(10)
    assert [path.name for path in tmp_path.iterdir()] == ["set"] and image_sets.is_sound(tmp_path / "set")


def test_an_interrupted_import_leaves_what_was_there(small, tmp_path, monkeypatch):
    zipped(tmp_path / "cifar100.zip", cifar_members())
    folder = fetch("cifar100", tmp_path)
    (folder / "about.json").write_text("{}")  # damaged: it will be imported again
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(image_sets.os, "replace", interrupted)
        fetch("cifar100", tmp_path)
    assert {path.name for path in folder.parent.iterdir()} <= {"cifar100"}
    if folder.exists():
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    fetch("cifar100", tmp_path)
    assert cifar100.is_present(tmp_path / "data")


@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy", "about.json"])
def test_damage_on_the_disk_is_found_when_the_set_is_opened(file, small, tmp_path):
    zipped(tmp_path / "cifar100.zip", cifar_members())
    path = fetch("cifar100", tmp_path) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(cifar100.UserError, match="damaged.*get_data.py cifar100"):
        cifar100.load(tmp_path / "data")
    fetch("cifar100", tmp_path)
    assert cifar100.is_present(tmp_path / "data")


# ---------------------------------------------------------------- Omniglot


CHARACTERS = {
    "background": ("Greek/character01", "Greek/character02", "Latin/character01"),
    "evaluation": ("Oriya/a", "Oriya/b"),
}


def drawing(character: str, drawer: int) -> np.ndarray:
    """Paper with one black square whose place tells the character and the drawer."""
    picture = np.full((105, 105), 255, np.uint8)
    row = 20 * (1 + sorted(name for names in CHARACTERS.values() for name in names).index(character) % 4)
    picture[row - 15 : row + 15, 30 * drawer : 30 * drawer + 30] = 0
    return picture


def omniglot_members() -> dict[str, dict[str, bytes]]:
    """Part -> the members of its archive, two drawings of each character, the later one first."""
    return {
        part: {
            f"images_{part}/{name}/{i:04d}_{drawer:02d}.png": encoded(drawing(name, drawer))
            for i, name in enumerate(names)
            for drawer in (2, 1)
        }
        for part, names in CHARACTERS.items()
    }


def write_omniglot(folder: Path, members: dict[str, dict[str, bytes]]) -> None:
    for part, content in members.items():
        zipped(folder / f"images_{part}.zip", content)


def test_omniglot_comes_in_at_both_sizes_whatever_the_order_of_the_files(small, tmp_path, capsys):
    write_omniglot(tmp_path, omniglot_members())
    fetch("omniglot", tmp_path)
    names = [name for part in CHARACTERS.values() for name in part]
    for side in (28, 84):
        found, _ = omniglot.load(tmp_path / "data", side)
        assert found.classes == names
        assert found.labels["train"].tolist() == [0, 0, 1, 1, 2, 2] and found.labels["test"].tolist() == [3, 3, 4, 4]
        assert found.images["train"].shape == (6, 1, side, side) and found.images["train"].dtype == torch.uint8
        for split, labels in found.labels.items():
            for n, (image, label) in enumerate(zip(found.images[split], labels.tolist(), strict=True)):
                expected = Image.fromarray(drawing(names[label], 1 + n % 2)).resize(
                    (side, side), omniglot.SIZES[side][1]
                )
                assert np.array_equal(image[0], np.asarray(expected)), "paper stays white"
    get_data.main(["omniglot", "--data_path", str(tmp_path / "data")])
    assert "already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "damage", "said"),
    [
        ("evaluation", _without("Oriya/b"), "has 1 characters, expected 2"),
        ("background", _without("Latin/character01/0002_02"), "Latin/character01 has 1 drawings"),
        ("background", lambda m: {**m, "images_background/Greek/character01/9999_02.png": b""}, "two drawings 02"),
        ("evaluation", lambda m: {name: encoded(np.zeros((28, 28), np.uint8)) for name in m}, "28 x 28 pixels"),
        ("evaluation", lambda m: dict.fromkeys(m, b"no image"), "no readable image"),
        ("background", lambda m: {**m, "../escaped.png": b""}, "outside the folder"),
    ],
)
def test_an_omniglot_archive_that_is_not_as_it_should_be_is_refused(part, damage, said, small, tmp_path, capsys):
    members = omniglot_members()
    write_omniglot(tmp_path, {**members, part: damage(members[part])})
    message = refused("omniglot", tmp_path, capsys)
    assert said in message and f"images_{part}.zip" in message


def test_omniglot_needs_both_archives(small, tmp_path, capsys):
    members = omniglot_members()
    write_omniglot(tmp_path, {"background": members["background"]})
    assert "images_evaluation.zip" in refused("omniglot", tmp_path, capsys)
    with pytest.raises(omniglot.UserError, match="has no omniglot84.*get_data.py omniglot"):
        omniglot.load(tmp_path / "data", 84)
