"""Preparing data, and reading what was prepared: good files, and every kind of damage. SLOW=1 reads ten times
as many mutated files."""

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import data
from masks import UserError
from scripts import prepare
from support import testing

pytest_plugins = ["support.testing"]
MUTATED = 200 if "SLOW" in os.environ else 20  # files for each reader
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)


def refused(capsys, *arguments):
    """The one line with which the command ends, behind the bars of downloads."""
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(argument) for argument in arguments])
    *bars, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and not any("Traceback" in bar for bar in bars)
    return line


BAD_SHARDS = [
    {"magic": 20240801}, {"version": 2}, {"number": 400}, {"number": 2**31 - 1}, {"number": -500},
    {"tokens": [50257] * 500}, {"tokens": []}, b"", b"short", None,
]  # fmt: skip


@pytest.mark.parametrize("damage", BAD_SHARDS)
def test_bad_shards(shards, damage):
    for path in shards.glob("*train*"):
        path.unlink()
    path = shards / "fineweb_train_000001.bin"
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    elif damage:
        testing.write_shard(path, **({"tokens": [1] * 500} | damage))
    with pytest.raises(UserError) as refusal:
        data.load("fineweb", shards, context=32)
    (line,) = str(refusal.value).splitlines()
    assert f"run python -m scripts.prepare fineweb --data-dir {shards}" in line
    assert line.startswith(f"{path}: " if damage is not None else "--data-dir")


def test_fineweb_downloads_and_goes_on(tmp_path, capsys, shards, web):
    """A part that was left is completed; what is there is not loaded again; a bad one gets no name."""
    here, names = tmp_path / "here", sorted(path.name for path in shards.iterdir())
    shutil.copytree(shards, web.folder, dirs_exist_ok=True)
    here.mkdir()
    (here / f"{names[0]}.part").write_bytes((shards / names[0]).read_bytes()[:700])
    flags = ["fineweb", "--data-dir", str(here), "--data-url", web.url, "--shards"]
    prepare.main([*flags, "2"])
    assert "train_000002.bin: 500 tokens" in capsys.readouterr().out
    assert [(path, begin) for path, begin in web.asked if begin] == [(f"/{names[0]}", "bytes=700-")]
    assert all((here / name).read_bytes() == (shards / name).read_bytes() for name in names)
    prepare.main([*flags, "2"])
    assert len(web.asked) == 3 and len(list(here.iterdir())) == 3
    testing.write_shard(web.folder / "fineweb_train_000003.bin", [1, 60000])
    for _ in range(2):  # the second time all bytes of the part are there already
        assert "train_000003.bin.part: has a token 60000" in refused(capsys, *flags, "3")
    assert not (here / "fineweb_train_000003.bin").exists()
    testing.write_shard(here / names[0], [1] * 50 + [60000] + [1] * 100_000)  # not in the sample of training
    assert data.load("fineweb", here, context=32).train[0][50] == 60000
    assert f"{names[0]}: has a token 60000" in refused(capsys, *flags, "2")


def official(images, labels, key=b"labels", module=b"numpy.core.multiarray"):
    """A pickle as the official files are: of Python 2, with numpy's old module name."""
    raw, shape = images.tobytes(), b"".join(b"I%d\n" % n for n in images.shape)
    return b"".join([
        b"(dS'data'\nc", module, b"\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR",
        b"(I1\n(", shape, b"t", b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb",
        b"I00\nT", len(raw).to_bytes(4, "little"), raw, b"tb",
        b"sS'", key, b"'\n(l", b"".join(b"I%d\na" % n for n in labels), b"s.",
    ])  # fmt: skip


def make_archive(monkeypatch, folder, name="cifar10", links=()):
    """An archive of small official files and of links, in a folder. Returns its row in the table of
    archives, which has its MD5."""
    source = prepare.CIFAR[name]
    path = folder / source.archive
    (folder / source.folder).mkdir()
    (folder / "link").symlink_to("/etc/passwd")
    for file in source.files:
        (folder / source.folder / file).write_bytes(official(IMAGES, [0, 1, 2], source.key))
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder / source.folder, source.folder)
        for file in links:
            tar.add(folder / "link", file)
    source = source._replace(md5=hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setitem(prepare.CIFAR, name, source)
    return source


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_downloads_checks_and_unpacks(tmp_path, monkeypatch, web, name):
    source = make_archive(monkeypatch, web.folder, name, links=["cifar-10-batches-py/link", "../outside"])
    here, parts = tmp_path / "here", len(source.files) - 1
    here.mkdir()
    (here / f"{source.archive}.part").write_bytes((web.folder / source.archive).read_bytes()[:700])
    prepare.prepare_cifar(name, here, web.url + source.archive)
    images = data.load(name, here)
    assert (images.epoch_size, images.tests, images.outputs) == (3 * parts, 3, source.classes)
    assert images.labels.tolist() == [0, 1, 2] * parts
    assert sorted(os.listdir(here)) == sorted([name, source.archive])
    assert sorted(os.listdir(here / name)) == sorted(["about.json", *(f"{a}.npy" for a in data.ARRAYS)])
    assert not (tmp_path / "outside").exists()
    prepare.prepare_cifar(name, here, "http://localhost:1/never-asked")  # once it is there, without a network
    assert web.asked == [(f"/{source.archive}", "bytes=700-")]


def test_cifar_reads_the_pixels():
    of_python_3 = {b"data": IMAGES, b"labels": [0, 1, 9], b"batch_label": b"1"}
    pickles = [official(IMAGES, [0, 1, 9]), official(IMAGES, [0, 1, 9], module=b"numpy._core.multiarray")]
    for content in (*pickles, pickle.dumps(of_python_3, protocol=2)):
        read, labels = prepare.read_batch(content, "file", prepare.CIFAR["cifar10"])
        assert (read.reshape(3, 3072) == IMAGES).all() and labels.tolist() == [0, 1, 9]


@testing.needs_images
def test_cifar_of_the_sample(tmp_path):
    (tmp_path / "cifar-10-batches-py").symlink_to(testing.SAMPLES / "cifar-10-batches-py")
    prepare.main(["cifar10", "--data-dir", str(tmp_path)])
    images = data.load("cifar10", tmp_path)
    assert (images.epoch_size, images.tests, images.outputs) == (10_000, 2_000, 10)
    x, _ = images.validation(slice(0, 500))
    assert x.mean().abs() < 0.2 and 0.8 < x.std() < 1.2


@pytest.mark.parametrize("file, says", [("elsewhere", "404"), ("short", "is truncated or wrong")])
def test_bad_archives(tmp_path, monkeypatch, capsys, web, file, says):
    source = make_archive(monkeypatch, web.folder)
    (web.folder / "short").write_bytes((web.folder / source.archive).read_bytes()[:-1000])
    command = ["cifar10", "--data-dir", tmp_path / "here", "--data-url", web.url + file]
    assert says in refused(capsys, *command)
    assert not list(tmp_path.glob("here/**/part*"))
    with pytest.raises(UserError, match="run python -m scripts.prepare cifar10 --data-dir"):
        data.load("cifar10", tmp_path / "here")


BAD_BATCHES = {  # content of an official file, and what the line must say
    "image size": (official(IMAGES[:, :192], [0, 1, 2]), "reshape"),
    "labels": (official(IMAGES, [0, 1, 10]), "not those of 10 classes"),
    "labels below 0": (official(IMAGES, [0, 1, -1]), "not those of 10 classes"),
    "too few labels": (official(IMAGES, [0, 1]), "(2,) labels"),
    "no images": (official(IMAGES[:0], []), "not a valid file of cifar-10"),
    "labels of another archive": (official(IMAGES, [0, 1, 2], b"fine_labels"), "labels"),
    "no array": (pickle.dumps({b"data": b"x", b"labels": [1]}, 2), "not a valid file of cifar-10"),
    "an array of objects": (pickle.dumps({b"data": np.array([[]] * 3, object), b"labels": [1]}, 2), "bytes"),
    "half a file": (official(IMAGES, [0, 1, 2])[:5000], "not a valid file of cifar-10"),
    "empty file": (b"", "not a valid file of cifar-10"),
    "text": (b"hello", "not a valid file of cifar-10"),
    "another pickle": (pickle.dumps([1, 2]), "not a valid file of cifar-10"),
    "a call": (b"cos\nsystem\n(S'touch /tmp/sdp-was-here'\ntR.", "os.system"),
    "nothing": (None, "No such file"),
}


@pytest.mark.parametrize("damage", BAD_BATCHES)
def test_bad_official_files(tmp_path, capsys, damage):
    content, says = BAD_BATCHES[damage]
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    if content is not None:
        for file in prepare.CIFAR["cifar10"].files:
            (folder / file).write_bytes(content)
    line = refused(capsys, "cifar10", "--data-dir", tmp_path)
    assert f"{folder}/data_batch_1" in line and says in line
    assert not Path("/tmp/sdp-was-here").exists() and not list(tmp_path.glob("cifar10/*"))


BAD_ARRAYS = {  # file of the folder, its new content or length, what the line must say
    "no labels": ("val-labels.npy", None, "val-labels.npy"),
    "text": ("train.npy", b"not an array", "magic"),
    "cut off": ("train.npy", 1000, "length"),
    "empty": ("val.npy", b"", "magic"),
    "not json": ("about.json", b"{", "line 1"),
    "a list": ("about.json", b"[]", "TypeError"),
    "no classes": ("about.json", b'{"size": 8, "side": 8}', "classes"),
    "a size above the side": ("about.json", b'{"size": 9, "side": 8, "classes": [0, 1, 2]}', "about.json"),
    "another side": ("about.json", b'{"size": 8, "side": 9, "classes": [0, 1, 2]}', "9 pixels"),
    "fewer classes": ("about.json", b'{"size": 8, "side": 8, "classes": [0, 1]}', "2 classes"),
    "more labels": ("train-labels.npy", np.zeros(7, np.int64), "(7,) labels"),
    "labels of floats": ("train-labels.npy", np.zeros(6), "labels"),
    "a label below 0": ("val-labels.npy", np.array([0, 1, -1]), "labels"),
    "images of floats": ("val.npy", np.zeros((3, 3, 8, 8)), "float64"),
    "objects": ("train-labels.npy", np.array([None] * 6), "objects"),
}


@pytest.mark.parametrize("damage", BAD_ARRAYS)
def test_bad_arrays(tmp_path, damage):
    file, content, says = BAD_ARRAYS[damage]
    path = tmp_path / "arrays" / file
    testing.write_images(path.parent, train=6, test=3, side=8, classes=3)
    if content is None:
        path.unlink()
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:content])
    with pytest.raises(UserError) as refusal:
        data.load("imagenet", path.parent)
    (line,) = str(refusal.value).splitlines()
    assert says in line and f"scripts.prepare imagenet --src DIR --out {path.parent}" in line


@testing.needs_images
def test_imagenet_of_the_sample(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    src, out = tmp_path / "src", tmp_path / "out"
    shutil.copytree(testing.SAMPLES / "imagenet-sample", src)
    classes = sorted(os.listdir(src / "train"))
    (src / "train" / classes[1] / "broken.JPEG").write_bytes(b"not an image")
    prepare.prepare_imagenet(src, out, size=64)
    assert "broken.JPEG" in (printed := capsys.readouterr().out)
    assert "24 images of 24 classes, 1 skipped" in printed and len(list(out.iterdir())) == 5
    images = data.load("imagenet", out)
    assert isinstance(images.train, np.memmap) and images.train.shape == (24, 3, 73, 73)
    assert images.shape == {"classes": 24, "image": 64} and images.labels.tolist() == list(range(24))
    (path,) = (src / "val" / classes[5]).iterdir()
    with image.open(path) as picture:
        colour = np.asarray(picture.convert("RGB").resize((1, 1), image.Resampling.BOX)).reshape(3)
    assert np.abs(images.test[5].mean((1, 2)) - colour).max() < 25  # that image, its channels in order


def test_readers_survive_mutated_files(tmp_path):
    """The content or a UserError in one line, in little memory, and no hang."""
    arrays, shard, batch = tmp_path / "arrays", tmp_path / "shard", tmp_path / "test_batch"
    testing.write_images(arrays, train=6, test=3, side=8, classes=3)
    testing.write_shard(shard, np.arange(3000) % data.TOKENS)
    batch.write_bytes(official(IMAGES, [0, 1, 2]))
    readers = {
        arrays / "train.npy": lambda: data.load("imagenet", arrays),
        arrays / "about.json": lambda: data.load("imagenet", arrays),
        shard: lambda: data.read_shard(shard),
        batch: lambda: prepare.read_batch(batch.read_bytes(), batch, prepare.CIFAR["cifar10"]),
    }
    rng, huge_memo = np.random.default_rng(0), b"\x80\x02}r" + (2**28).to_bytes(4, "little") + b"."
    tracemalloc.start()
    for path, read in readers.items():
        good = path.read_bytes()
        for content in (huge_memo, *testing.mutations(good, MUTATED, rng)):
            path.write_bytes(content)
            try:
                read()
            except UserError as error:
                assert "\n" not in str(error) and str(path.parent) in str(error), error
        path.write_bytes(good)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


SOURCES = (  # of ImageNet, all of broken images
    "no-val/train/a/x.jpg empty/train/a/x.jpg empty/train/b/x.txt empty/val/a/x.jpg foreign/train/a/x.jpg "
    "foreign/val/c/x.jpg broken/train/a/x.jpg broken/val/a/x.jpg file"
).split()
BAD_COMMANDS = [  # what the one line must say
    ("", ["cifar10", "fineweb"]),
    ("mnist", ["mnist", "cifar10"]),
    ("cifar10 --data-dir DIR --data-url nonsense", ["nonsense", "--data-url", "cifar-10-python"]),
    ("cifar10 --data-dir DIR --data-url http://localhost:1/x", ["could not be downloaded", "--data-url"]),
    ("cifar10 --data-dir DIR --data-url http://localhost:xx/c", ["could not be downloaded", "--data-url"]),
    ("cifar10 --data-dir /dev/null/x --data-url nonsense", ["/dev/null/x"]),
    ("cifar10 --data-dir /proc", ["/proc/cifar10"]),  # where nobody can write
    ("cifar100 --size 32", ["--size"]),
    ("imagenet", ["--src"]),
    ("imagenet --src /nowhere --out DIR/out", ["--src", "/nowhere/train"]),
    ("imagenet --src DIR --size 3", ["--size", "at least 16"]),
    ("imagenet --src DIR --size big", ["--size", "big"]),
    ("imagenet --src DIR/no-val --out DIR/out", ["--src: DIR/no-val/val must have folders"]),
    ("imagenet --src DIR/empty --out DIR/out", ["--src: DIR/empty/train must have folders", "empty: ['b']"]),
    ("imagenet --src DIR/foreign --out DIR/out", ["val has the class c"]),
    ("imagenet --src DIR/broken --out DIR/out", ["train/a has only broken images"]),
    ("imagenet --src DIR/broken --out DIR/file", ["DIR/file"]),
    ("fineweb --shards 0", ["--shards", "at least 1"]),
    ("fineweb --shards 104", ["--shards 104", "103"]),
    ("fineweb --data-dir /dev/null/x", ["/dev/null/x"]),
    ("fineweb --data-dir DIR --data-url nonsense", ["nonsense", "try again"]),
]


@pytest.mark.parametrize("command, says", BAD_COMMANDS)
def test_bad_commands(tmp_path, capsys, command, says):
    if command.startswith("imagenet --src"):
        pytest.importorskip("PIL", reason="Pillow is not installed")
    for file in SOURCES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"not an image")
    line = refused(capsys, *command.replace("DIR", str(tmp_path)).split())
    assert all(word.replace("DIR", str(tmp_path)) in line for word in says), line
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == len(SOURCES)


def test_imagenet_needs_pillow(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install pillow" in refused(capsys, "imagenet", "--src", tmp_path)


def test_the_real_command():
    command = [sys.executable, "-m", "scripts.prepare", "fineweb", "--shards", "104"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 1), ended.stderr
