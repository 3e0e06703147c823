import gzip
import http.client
import io
import random
import ssl
import urllib.error

import pytest

import get_data
from dataloaders import mnist

FAKE = {name: random.Random(name).randbytes(200) + bytes(100) for name in mnist.FILES}


@pytest.fixture
def small_mnist(monkeypatch):
    """Four small files stand in for MNIST's, with their own digests."""
    import hashlib

    files = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in FAKE.items()}
    monkeypatch.setattr(mnist, "FILES", files)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    (folder / "mnist").mkdir(parents=True)
    for name, content in FAKE.items():
        (folder / "mnist" / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        get_data.main(list(argv))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("get_data.py: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("name", ["mnist", "rotations", "permutations", "manypermutations"])
def test_imports_verifies_and_then_does_nothing(name, small_mnist, source, tmp_path, capsys):
    target = tmp_path / "data"
    get_data.main([name, "--source", str(source), "--data_path", str(target)])
    assert files_in(target) == files_in(source)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    get_data.main([name, "--data_path", str(target)])  # no source, no internet: nothing to do
    assert "already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


def test_uncompressed_files_are_taken_too(small_mnist, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in FAKE.items():
        (raw / name).write_bytes(content)
    get_data.main(["mnist", "--source", str(tmp_path), "--data_path", str(tmp_path / "data")])
    assert mnist.is_present(tmp_path / "data")


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-9],
        lambda packed: packed[:10],
        lambda packed: packed[:30] + bytes([packed[30] ^ 1]) + packed[31:],
        lambda packed: b"",
        lambda packed: b"<html>not found</html>",
        lambda packed: gzip.compress(b"something else"),
        lambda packed: gzip.compress(bytes(10**7)),
    ],
)
def test_a_damaged_or_tampered_archive_is_refused_and_leaves_nothing(damage, small_mnist, source, tmp_path, capsys):
    archive = source / "mnist" / "t10k-images-idx3-ubyte.gz"
    archive.write_bytes(damage(archive.read_bytes()))
    message = refused(capsys, "mnist", "--source", str(source), "--data_path", str(tmp_path / "data"))
    assert "t10k-images-idx3-ubyte" in message
    assert not list((tmp_path / "data").rglob("*t10k-images*"))


def test_damage_after_the_import_is_found_when_the_data_are_read(small_mnist, source, tmp_path, capsys):
    target = tmp_path / "data"
    get_data.main(["mnist", "--source", str(source), "--data_path", str(target)])
    archive = target / "mnist" / "train-labels-idx1-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:-3])
    assert not mnist.is_present(target)
    with pytest.raises(mnist.UserError, match="train-labels.*cannot be used.*get_data.py mnist"):
        mnist.read_file(archive, "train-labels-idx1-ubyte")
    get_data.main(["mnist", "--source", str(source), "--data_path", str(target)])
    assert mnist.is_present(target)


def test_the_second_home_is_tried_and_bad_downloads_are_not_kept(small_mnist, tmp_path, monkeypatch):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        home, name = url.rsplit("/", 1)
        if home + "/" == mnist.HOMES[0]:
            return io.BytesIO(b"an error page")
        return io.BytesIO(gzip.compress(FAKE[name.removesuffix(".gz")]))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    get_data.main(["mnist", "--data_path", str(tmp_path)])
    assert len(asked) == 8 and mnist.is_present(tmp_path)
    assert len(files_in(tmp_path)) == 4


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), http.client.IncompleteRead(b""), ssl.SSLError("bad")])
def test_a_broken_connection_is_one_home_less(error, small_mnist, tmp_path, monkeypatch):
    def urlopen(url, timeout):
        if url.startswith(mnist.HOMES[0]):
            raise error
        return io.BytesIO(gzip.compress(FAKE[url.rsplit("/", 1)[1].removesuffix(".gz")]))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    get_data.main(["mnist", "--data_path", str(tmp_path)])
    assert mnist.is_present(tmp_path)


def test_without_internet_one_sentence_says_what_to_do(small_mnist, tmp_path, monkeypatch, capsys):
    def urlopen(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert "--source" in refused(capsys, "mnist", "--data_path", str(tmp_path))
    assert not files_in(tmp_path)


def test_other_mistakes(tmp_path, capsys):
    assert "mnist" in refused(capsys, "mnits")
    assert "--source" in refused(capsys, "mnist", "--source", str(tmp_path / "nowhere"), "--data_path", str(tmp_path))
    assert "cannot be written" in refused(capsys, "mnist", "--data_path", "/proc/nowhere")
    assert "name" in refused(capsys)
