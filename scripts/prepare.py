"""Prepare data for training: download and check it, and write it as arrays that data.py maps into memory.

python -m scripts.prepare cifar10                          # or cifar100
python -m scripts.prepare imagenet --src DIR --size 224    # of folders of JPEGs (needs Pillow)
python -m scripts.prepare fineweb --shards 10              # a billion tokens of web text"""

import hashlib
import http.client
import importlib.util
import io
import json
import pickle
import shutil
import tarfile
import tempfile
import urllib.request
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from masks import UserError
from support.launch import Parser, at_least

FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")
Cifar = namedtuple("Cifar", "archive md5 folder files key classes")  # the last file is the one to test on
CIFAR = {
    "cifar10": Cifar("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py",
                     [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], b"labels", 10),
    "cifar100": Cifar("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python",
                      ["train", "test"], b"fine_labels", 100),
}  # fmt: skip


def download(url, path):
    """Download to PATH.part, after what it has. Returns that; or `path`, where it exists already."""
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.part")
    begin = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
        with urllib.request.urlopen(request, timeout=30) as reply:
            begin = begin if reply.status == 206 else 0  # 200: it sends all again
            total = begin + int(reply.headers["Content-Length"] or 0)
            with part.open("ab" if begin else "wb") as file:
                with tqdm.wrapattr(file, "write", total, initial=begin, desc=path.name) as output:
                    shutil.copyfileobj(reply, output)
    except (OSError, ValueError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: nothing comes after what is there
            remedy = f"try again, name a mirror by --data-url, or put {path.name} into {path.parent}"
            raise UserError(f"{url}: could not be downloaded ({error!r}); {remedy}") from None
    return part


def prepare_fineweb(folder, shards, url=None):
    """Download a shard to validate on and `shards` to train on. Check every token. Raises UserError."""
    if shards > 103:
        raise UserError(f"--shards {shards}: must be at most 103")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("fineweb_val_000000.bin", *(f"fineweb_train_{i:06}.bin" for i in range(1, shards + 1))):
        received = download(f"{(url or FINEWEB_URL).rstrip('/')}/{name}", folder / name)
        tokens = data.read_shard(received, every_token=True)
        received.replace(folder / name)
        print(f"{name}: {len(tokens):,} tokens")


@contextmanager
def new_arrays(out, size, side, classes):
    """Gives a folder to write arrays to. They move to `out` when all are there, about.json last."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="part-") as part:
        yield Path(part)
        (out / "about.json").unlink(missing_ok=True)
        for array in data.ARRAYS:
            Path(part, f"{array}.npy").replace(out / f"{array}.npy")
        (out / "about.json").write_text(json.dumps({"size": size, "side": side, "classes": list(classes)}))


def prepare_cifar(name, data_dir, url=None):
    """Write CIFAR-10 or -100 as arrays to the folder `name` in `data_dir`. Raises UserError, OSError."""
    source = CIFAR[name]
    with new_arrays(data_dir / name, 32, 32, range(source.classes)) as part:
        batches = [read_batch(*file, source) for file in official_files(source, data_dir, url)]
        for split, of_split in (("train", batches[:-1]), ("val", batches[-1:])):
            images, labels = (np.concatenate(arrays) for arrays in zip(*of_split))
            np.save(part / f"{split}.npy", images)
            np.save(part / f"{split}-labels.npy", labels)
            print(f"{split}: {len(labels):,} images of {source.classes} classes")


def official_files(source, data_dir, url):
    """[(content, path)] of the official files, from their folder in `data_dir` or else the archive."""
    names = [f"{source.folder}/{file}" for file in source.files]
    if (data_dir / source.folder).exists():
        return [((data_dir / name).read_bytes(), data_dir / name) for name in names]
    archive = data_dir / source.archive
    received = download(url or CIFAR_URL + source.archive, archive)
    if hashlib.md5(received.read_bytes()).hexdigest() != source.md5:
        raise UserError(f"{received}: is truncated or wrong; try again, delete it, or change --data-url")
    received.replace(archive)
    with tarfile.open(archive, "r:gz") as tar:
        return [(tar.extractfile(name).read(), archive / name) for name in names]


class State(list):  # of an array or a dtype in a pickle: numpy itself can crash on a damaged one
    def __setstate__(self, state):
        self.extend(state)


class ArrayUnpickler(pickle._Unpickler):  # the one in C reserves all memory that a damaged file asks for
    def find_class(self, module, name):  # what a pickle can call: nothing but this
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")  # how bytes are written, and no other encoding
        if module.startswith("numpy") and name in ("ndarray", "dtype", "_reconstruct"):
            return lambda *_: State()
        raise pickle.UnpicklingError(f"contains {module}.{name}")


def read_batch(content, path, source):
    """(images, uint8 (n, 3, 32, 32); labels, int64 (n,)) of an official file's bytes. Raises UserError."""
    try:
        batch = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        _, shape, _, is_fortran, raw = batch[b"data"]
        images = np.ndarray(shape, np.uint8, raw, order="F" if is_fortran else "C").reshape(-1, 3, 32, 32)
        labels = np.fromiter(batch[source.key], np.int64)
        data.check_images(images, labels, 32, source.classes)
    except (*data.DAMAGED, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: is not a valid file of {source.archive} ({error!r}); delete it") from None
    return images, labels


def prepare_imagenet(src, out, size):
    """Write the images of src/train and src/val as arrays, of squares to crop. Raises UserError."""
    if importlib.util.find_spec("PIL") is None:
        raise UserError("decoding JPEGs needs Pillow: pip install pillow")
    side = size + size // 7  # 256 for 224
    train, val = class_folders(src / "train"), class_folders(src / "val")
    if not val.keys() <= train.keys():
        raise UserError(f"--src {src}: val has the class {min(val.keys() - train)}, but train does not")
    with new_arrays(out, size, side, train) as part:
        for split, folders in (("train", train), ("val", val)):
            write_split(src, part, split, folders, list(train), side)


def class_folders(folder):
    """{class: paths of its images} of a folder of folders. Raises UserError where one has none."""
    images = {}
    for here in sorted(folder.glob("*/")):
        images[here.name] = [p for p in sorted(here.glob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    empty = [name for name in images if not images[name]]
    if empty or not images:
        raise UserError(f"--src: {folder} must have folders of JPEGs or PNGs; empty: {empty[:3]}")
    return images


def write_split(src, part, split, folders, classes, side):
    """Write the images and labels of one split. Raises UserError where a class has only broken images."""
    paths = [path for name in folders for path in folders[name]]
    names = []  # of the classes of the images that were written
    with (part / f"{split}.npy").open("wb") as file, ThreadPoolExecutor() as pool:
        file.seek(128)  # the length of the header, which has the number of images
        for begin in tqdm(range(0, len(paths), 256), desc=f"{split}, 256 images each"):  # in memory at a time
            some = paths[begin : begin + 256]
            for path, image in zip(some, pool.map(decode, some, [side] * len(some))):
                if image is not None:
                    file.write(image.tobytes())
                    names.append(path.parent.name)
        file.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(names), 3, side, side)}
        np.lib.format.write_array_header_1_0(file, header)
    lost = folders.keys() - set(names)
    if lost:
        raise UserError(f"--src {src}: {split}/{min(lost)} has only broken images")
    np.save(part / f"{split}-labels.npy", np.searchsorted(classes, names).astype(np.int64))
    print(f"{split}: {len(names):,} images of {len(folders)} classes, {len(paths) - len(names)} skipped")


def decode(path, side):
    """The centre of an image, uint8 (3, side, side). Names one that is broken, and returns None."""
    from PIL import Image, ImageOps  # only ImageNet needs it

    try:
        with Image.open(path) as image:
            image.draft("RGB", (side, side))  # lets the JPEG decoder skip most of a large image
            square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
            return np.asarray(square).transpose(2, 0, 1)  # to (3, side, side)
    except (*data.DAMAGED, Image.DecompressionBombError) as error:
        tqdm.write(f"skipped {path}: {error!r}")


def main(arguments=None):
    parser = Parser(prog="python -m scripts.prepare", description=__doc__.splitlines()[0], allow_abbrev=False)
    parsers = parser.add_subparsers(dest="data", required=True, metavar="{cifar10,cifar100,imagenet,fineweb}")
    cifar10, cifar100, imagenet, fineweb = map(parsers.add_parser, (*CIFAR, "imagenet", "fineweb"))
    for command, folder in ((cifar10, "datasets"), (cifar100, "datasets"), (fineweb, "datasets/fineweb")):
        command.add_argument("--data-dir", default=folder, help=f"folder for the data (default: {folder})")
        command.add_argument("--data-url", help="a mirror (default: the official site)")
    fineweb.add_argument("--shards", type=at_least(1), default=1, help="1 to 103, of 200 MB (default: 1)")
    imagenet.add_argument("--src", required=True, help="folder with train/ and val/, with a folder a class")
    imagenet.add_argument("--size", type=at_least(16), default=224, help="pixels of a side (default: 224)")
    imagenet.add_argument("--out", default="datasets/imagenet", help="folder (default: datasets/imagenet)")
    args = parser.parse_args(arguments)
    with parser.answering(UserError, OSError):  # an OSError names what cannot be written or read
        if args.data == "fineweb":
            prepare_fineweb(Path(args.data_dir), args.shards, args.data_url)
        elif args.data == "imagenet":
            prepare_imagenet(Path(args.src), Path(args.out), args.size)
        else:
            prepare_cifar(args.data, Path(args.data_dir), args.data_url)


if __name__ == "__main__":
    main()
