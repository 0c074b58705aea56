"""What is learnt: batches of text or of images, which depend only on (seed, step).

    python data.py cifar10                          # or cifar100: download, check and unpack it
    python data.py imagenet --src DIR --size 224    # make arrays of folders of JPEGs (needs Pillow)
    python data.py fineweb --shards 10              # download a billion tokens of web text

No worker, process or mask enters the choice of a batch: all random numbers of a step are drawn for the whole
batch, and a worker takes its rows of it. So runs with other numbers of workers see the same data.

Needs numpy, torch and tqdm, and the parser of masks.py. Read next: train.py, the loop that uses it.
"""

import hashlib
import http.client
import json
import os
import pickle
import sysconfig
import tarfile
import tempfile
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from masks import Parser, at_least

# ---- text

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}  # folders
HELD_OUT = 13  # of 256, the share of the files that make the validation set


class Text:
    """Tokens to train on and tokens held out, each a list of 1-D integer arrays, in memory or memory-mapped,
    in windows of `context` tokens that lie in one array.

    shape: what a model must know; rows: of how many windows an epoch consists; tests: how many there are to
    validate, evenly spaced over the held-out tokens. Raises ValueError where there are not enough tokens.
    """

    def __init__(self, train, held_out, vocabulary, context, tests=1):
        fewest = min(map(len, (*train, *held_out)))
        if fewest <= context:
            raise ValueError(f"--context {context}: must be below {fewest}, the tokens that there are")
        self.train, self.held_out, self.context, self.tests = train, held_out, context, tests
        self.shape = {"vocabulary": vocabulary, "context": context}
        self.rows = sum(map(len, train)) // context

    def batch(self, seed, step, size, rows=slice(None), device="cpu"):
        """Those rows of a step's batch of `size` random windows: (tokens, targets), int64 (rows, context)."""
        first = first_windows(self.train, self.context)
        numbers = np.random.default_rng([seed, step]).integers(0, first[-1], size)
        return windows(self.train, numbers[rows], self.context, device)

    def validation(self, rows, device="cpu"):
        """Those of the windows to validate, as (tokens, targets) like a batch."""
        first = first_windows(self.held_out, self.context)
        numbers = np.linspace(0, first[-1] - 1, self.tests).astype(np.int64)
        return windows(self.held_out, numbers[rows], self.context, device)

    def to(self, device):
        return self  # windows are cut on the CPU

    def fingerprint(self):
        """A number by which processes find out whether they train on the same data; of large arrays, from
        their ends alone."""
        found = 0
        for tokens in (*self.train, *self.held_out):
            few = len(tokens) < 2**25
            for part in (tokens,) if few else (tokens[: 2**20], tokens[-(2**20) :]):
                found = zlib.crc32(part, found)
        return found


def first_windows(arrays, context):
    """The numbers of each array's first window, and how many there are: windows are numbered through all."""
    return np.cumsum([0] + [len(tokens) - context for tokens in arrays])


def windows(arrays, numbers, context, device):
    """The windows with those numbers: (tokens, targets), each int64 (len(numbers), context)."""
    first = first_windows(arrays, context)
    which = np.searchsorted(first, numbers, side="right") - 1
    rows = [arrays[w][start:][: context + 1] for w, start in zip(which, numbers - first[which])]
    rows = torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, context + 1)).to(device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def python_text(folder=None, context=128, tests=1):
    """The bytes of the .py files under `folder`, by default the running Python's standard library without its
    tests: about 11 MB of real text that every machine already has.

    A file is held out for validation by a hash of its path relative to the folder, so the split is the same
    wherever the folder lies. Raises ValueError where there are too few files for both parts.
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    parts = {True: [], False: []}  # held out, or trained on
    for here, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - LEFT_OUT)  # in place: the walk goes on in this order
        for path in (Path(here, name) for name in sorted(files) if name.endswith(".py")):
            held_out = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()[0] < HELD_OUT
            parts[held_out].append(path.read_bytes())
    train, held_out = (np.frombuffer(b"\n".join(parts[key]), dtype=np.uint8) for key in (False, True))
    if not len(train) or not len(held_out):
        raise ValueError(
            f"--data-dir {folder or '(the standard library)'}: a folder with dozens of .py files is needed, "
            f"and there are {len(parts[False])} to train on and {len(parts[True])} held out; the default is "
            "the standard library of the running Python"
        )
    return Text([train], [held_out], 256, context, tests)


FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
TOKENS = 50257  # of GPT-2; a model for them has a few more, because 50304 is a multiple of 128


def fineweb(folder="datasets/fineweb", context=1024, tests=1):
    """Tokens of web text (https://arxiv.org/abs/2406.17557) in shards: all *_train_*.bin and *_val_*.bin that
    are in the folder, memory-mapped. Raises ValueError in one line where there is none, or a bad one."""
    shards = [
        [read_shard(p) for p in sorted(Path(folder).glob(f"*_{part}_*.bin"))] for part in ("train", "val")
    ]
    if not all(shards):
        raise ValueError(
            f"--data-dir {folder}: has no *_train_*.bin or no *_val_*.bin; "
            f"python data.py fineweb --shards 1 --data-dir {folder} downloads some"
        )
    return Text(*shards, 50304, context, tests)


def read_shard(path):
    """uint16 tokens, memory-mapped, of a file in llm.c's format (https://github.com/karpathy/llm.c): 256
    int32, of which the first are 20240520, 1 and the number of tokens; then the tokens. Raises ValueError."""
    remedy = f"delete it, and load it again by python data.py fineweb --data-dir {path.parent}"
    header, size = np.fromfile(path, dtype="<i4", count=256).tolist(), path.stat().st_size
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
        raise ValueError(f"{path}: is no shard of tokens, by its first numbers {header[:2]}; {remedy}")
    if size != 1024 + 2 * header[2] or header[2] < 1:
        raise ValueError(f"{path}: has {size:,} bytes, not those of {header[2]:,} tokens; {remedy}")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
    if (largest := tokens.max()) >= TOKENS:
        raise ValueError(f"{path}: has a token {largest}, beyond the vocabulary of {TOKENS}; {remedy}")
    return tokens


def download_fineweb(folder, shards, url=FINEWEB_URL):
    """Load the shard to validate on and the first `shards` to train on, unless they are there. What a broken
    connection leaves is gone on with next time. Raises ValueError."""
    folder = Path(folder)
    make_folder(folder)
    for name in ("fineweb_val_000000.bin", *(f"fineweb_train_{i:06}.bin" for i in range(1, shards + 1))):
        path, part = folder / name, folder / f"{name}.part"
        if not path.exists():
            receive(url.rstrip("/") + "/" + name, part, "try again: it goes on where it stopped")
            read_shard(part)
            part.replace(path)


# ---- images


class Images:
    """Images to train on and to test on: uint8 (n, 3, side, side), arrays in memory or memory-mapped, and
    labels, int64 (n,). Training sees random crops of `size` pixels, the test central ones.

    shape, rows, tests: see Text; mean, std: of the three channels, of 255. `crop` draws where to crop.
    """

    def __init__(self, train, labels, test, test_labels, classes, size, mean, std, crop):
        self.train, self.labels, self.test, self.test_labels = train, labels, test, test_labels
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (mean, std))
        self.crop, self.size, self.shape = crop, size, {"classes": classes, "image": size}
        self.rows, self.tests = len(train), len(test)

    def to(self, device):
        """Keep the images in the memory of an accelerator, if they take at most half of what is
        free there: then nothing but row numbers has to travel."""
        size = self.train.nbytes + self.test.nbytes
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2:
            self.train, self.test = (torch.from_numpy(a).to(device) for a in (self.train, self.test))
        return self

    def batch(self, seed, step, size, rows=slice(None), device="cpu"):
        """Those rows of a step's batch, cropped and perhaps mirrored: images, float32 (rows, 3, size, size),
        and labels, int64 (rows,). Each epoch goes through all images, in an order of its own. Step 0, which
        no training has, comes from before the first epoch."""
        places = range((step - 1) * size, step * size)
        chosen = [shuffled(seed, p // self.rows % 2**32, self.rows)[p % self.rows] for p in places]
        chosen = np.array(chosen)[rows]
        rng = np.random.default_rng([seed, step])
        boxes = self.crop(rng, size, self.train.shape[-1], self.size)  # for the whole batch
        boxes[:, 2] *= rng.choice([-1, 1], size)  # mirrored
        images = self._cut(self.train, chosen, boxes[rows], device)
        return images, self._pick(self.labels, chosen, device)

    def validation(self, rows, device="cpu"):
        """Those of the test images and their labels, like a batch."""
        chosen = np.arange(self.tests)[rows]
        scale = self.size / self.test.shape[-1]
        boxes = np.tile([0, 0, scale, scale], (len(chosen), 1))
        return self._cut(self.test, chosen, boxes, device), self._pick(self.test_labels, chosen, device)

    def _pick(self, array, rows, device):
        if isinstance(array, np.ndarray):
            return torch.from_numpy(array[rows]).to(device)
        return array[torch.from_numpy(rows).to(array.device)]

    def _cut(self, images, rows, boxes, device):
        """boxes: (B, 4), centre x, y and scales x, y, where an image reaches from -1 to 1; a negative scale
        mirrors. What lies outside of the image becomes its mean colour."""
        x = (self._pick(images, rows, device).float() - self.mean.to(device)) / self.std.to(device)
        x_centre, y_centre, x_scale, y_scale = torch.from_numpy(boxes).to(x).unbind(1)
        zero = torch.zeros_like(x_scale)
        theta = torch.stack([x_scale, zero, x_centre, zero, y_scale, y_centre], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, (len(x), 3, self.size, self.size), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)  # (B, 3, size, size)

    def fingerprint(self):
        """Of all labels and a few images: ImageNet is too large to be read at each start."""
        found = zlib.crc32(self.test_labels, zlib.crc32(self.labels))
        for images in (self.train, self.test):
            for row in np.linspace(0, len(images) - 1, 50).astype(int):
                found = zlib.crc32(np.ascontiguousarray(images[row]), found)
        return found


@lru_cache(2)  # a batch reaches into two epochs at most, unless it is larger than one
def shuffled(seed, epoch, rows):
    return np.random.default_rng([seed, epoch, 1]).permutation(rows)


def shifted(rng, number, side, size):
    """Boxes for small images (see Images._cut): moved by up to an eighth, 4 of 32 pixels, each way."""
    pixels = rng.integers(-(side // 8), side // 8 + 1, (number, 2))
    return np.column_stack([pixels * 2 / side, np.ones((number, 2))])


def resized(rng, number, side, size):
    """Boxes as of Inception (https://arxiv.org/abs/1409.4842): a quarter (there 8 %) to all of the area, 3/4
    to 4/3 as wide as high."""
    area, ratio = rng.uniform(0.25, 1, number), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), number))
    width, height = np.sqrt(area * ratio), np.sqrt(area / ratio)
    scale = np.minimum(1, np.column_stack([width, height]))
    return np.column_stack([rng.uniform(-1, 1, (number, 2)) * (1 - scale), scale])


# ---- CIFAR


class Cifar(NamedTuple):
    """One of the official archives, "python version" (https://www.cs.toronto.edu/~kriz/cifar.html)."""

    folder: str
    archive: str
    md5: str
    train: tuple  # files in the folder
    test: str
    label: str  # key of the labels in a file
    classes: int


CIFAR = {
    "cifar10": Cifar(
        "cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a",
        tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "labels", 10,
    ),
    "cifar100": Cifar(
        "cifar-100-python", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85",
        ("train",), "test", "fine_labels", 100,
    ),
}  # fmt: skip
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"


def cifar(name, data_dir="datasets", url=None):
    """CIFAR-10 or CIFAR-100 from its official files: in `data_dir`, or downloaded to it from `url`, a mirror
    of the archive. Under torchrun one process of each machine downloads, and the others wait for it. Raises
    ValueError, in one line, where there is nothing to be had or the files are not what they should be."""
    source, data_dir = CIFAR[name], Path(data_dir)
    folder = data_dir if data_dir.name == source.folder else data_dir / source.folder
    while not folder.exists() and int(os.environ.get("LOCAL_RANK", "0")) > 0:
        time.sleep(0.5)  # the folder gets its name when it is complete; torchrun ends who waits in vain
    if not folder.exists():
        unpack(source, download(source, folder.parent, url), folder)
    batches = [read_cifar(folder / file, source) for file in (*source.train, source.test)]
    *train, (test, test_labels) = batches
    images, labels = (np.concatenate(arrays) for arrays in zip(*train))
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    return Images(images, labels, test, test_labels, source.classes, 32, mean, std, shifted)


def download(source, folder, url=None):
    """The archive's path in `folder`, downloaded if it is not there, in any case with the right MD5."""
    path, url = folder / source.archive, url or CIFAR_URL + source.archive
    if path.exists():
        check_md5(path, source, f"delete it and load {source.archive} again")
        return path
    make_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix="part-") as part:
        part = Path(part) / source.archive
        if url.startswith(CIFAR_URL):
            print(f"from {CIFAR_URL} this can take an hour; --data-url names a mirror", flush=True)
        remedy = f"put {source.archive} or the folder {source.folder} into {folder}, or name a mirror of the"
        receive(url, part, f"{remedy} archive by --data-url")
        check_md5(part, source, f"it came from {url}: try again, or another --data-url")
        return part.replace(path)


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--data-dir {folder}: cannot be made ({error.strerror}); choose another") from None


def receive(url, path, remedy):
    """Download to `path`, after the bytes that it has already. Raises ValueError, with a remedy."""
    have = path.stat().st_size if path.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as reply:
            have = have if reply.status == 206 else 0  # 206: the server does begin there
            total = have + int(reply.headers.get("Content-Length", 0)) or None
            with (
                path.open("ab" if have else "wb") as file,
                tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=path.name) as bar,
            ):
                while block := reply.read(1 << 16):
                    bar.update(file.write(block))
        if total and path.stat().st_size != total:
            raise OSError(f"{path.stat().st_size:,} of {total:,} bytes came")
    except (OSError, ValueError, http.client.HTTPException) as error:
        if have and getattr(error, "code", None) == 416:  # there is nothing after them
            return
        raise ValueError(f"{url}: could not be downloaded ({error}); {remedy}") from None


def check_md5(path, source, remedy):
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != source.md5:
        raise ValueError(f"{path}: is truncated or another file (MD5 {found}, not {source.md5}); {remedy}")


def unpack(source, archive, folder):
    """Write the files that we know by name, and nothing else of what an archive may contain."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="part-") as part:
        part = Path(part) / source.folder
        part.mkdir()
        try:
            with tarfile.open(archive) as tar:
                for name in (*source.train, source.test):
                    (part / name).write_bytes(tar.extractfile(f"{source.folder}/{name}").read())
            if not folder.exists():  # another machine can have been faster
                part.rename(folder)
        except (tarfile.TarError, KeyError, AttributeError, EOFError, zlib.error, OSError) as error:
            raise ValueError(f"{archive}: cannot be unpacked to {folder} ({error})") from None


class ArrayUnpickler(pickle._Unpickler):
    """Reads arrays and plain containers, and can call nothing else that a pickle may name. The one in Python:
    the one in C makes as much room for its memo as a damaged file asks for, gigabytes."""

    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")  # how bytes are written, and no other encoding
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("numpy", "ndarray"):
            return None  # is only handed to _reconstruct, not called
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda *_: np.empty(0, np.uint8)  # an array without content, which follows
        raise pickle.UnpicklingError(f"contains {module}.{name}")


def read_cifar(path, source):
    """(images, uint8 (n, 3, 32, 32); labels, int64 (n,)) of one file."""
    try:
        with path.open("rb") as file:
            content = ArrayUnpickler(file, encoding="bytes").load()
        content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        images, labels = content["data"], np.array(content[source.label], dtype=np.int64)
        if images.dtype != np.uint8 or images.shape != (len(labels), 3 * 32 * 32) or not len(labels):
            raise ValueError(f"images of {images.dtype} {images.shape} for {len(labels)} labels")
        if labels.ndim != 1:
            raise ValueError(f"labels in {labels.ndim} dimensions")
        if labels.min() < 0 or labels.max() >= source.classes:
            raise ValueError(f"labels from {labels.min()} to {labels.max()}")
    except Exception as error:  # what a damaged pickle raises could be anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path}: is not a file of {source.archive} ({reason}); delete {path.parent} and load it again"
        ) from None
    return images.reshape(-1, 3, 32, 32), labels


# ---- ImageNet

ENDINGS = (".jpeg", ".jpg", ".png")


def imagenet(folder):
    """The arrays that `python data.py imagenet` has written to `folder`, memory-mapped. Raises ValueError."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "about.json").read_text())
        size, classes = about["size"], about["classes"]
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("train", "val")]
        labels = [np.load(folder / f"{name}-labels.npy") for name in ("train", "val")]
        for images, of_images in zip(arrays, labels):
            n, side = len(of_images), about["side"]
            if images.dtype != np.uint8 or images.shape != (n, 3, side, side) or not 0 < size <= side:
                raise ValueError(f"images of {images.dtype} {images.shape} for {n} labels, {side} pixels")
            if of_images.dtype != np.int64 or not set(of_images.tolist()) <= set(range(len(classes))):
                raise ValueError(f"labels that are not those of {len(classes)} classes")
    except Exception as error:  # what a damaged file raises could be anything
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--data-dir {folder}: has no complete arrays of images ({reason}); make them with "
            f"python data.py imagenet --src DIR --out {folder}"
        ) from None
    mean, std = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
    return Images(arrays[0], labels[0], arrays[1], labels[1], len(classes), size, mean, std, resized)


def class_folders(folder):
    """{class: its images} of a folder of folders. Raises ValueError where one has none."""
    if not folder.is_dir():
        raise ValueError(f"--src {folder.parent}: has no folder {folder.name}; train/ and val/ are needed")
    found = {
        here.name: sorted(path for path in here.iterdir() if path.suffix.lower() in ENDINGS)
        for here in sorted(folder.iterdir())
        if here.is_dir()
    }
    empty = [name for name, images in found.items() if not images]
    if empty or not found:
        what = f"the class folder {empty[0]} has" if empty else "there are"
        raise ValueError(f"--src {folder.parent}: in {folder.name} {what} no images ({', '.join(ENDINGS)})")
    return found


def make_imagenet(src, out, size):
    """Write the images below src/train and src/val as arrays to `out`: scaled so that the shorter side has a
    seventh more than `size` pixels, and cropped to a square. A broken one is named, counted and left out."""
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("decoding JPEGs needs Pillow: pip install pillow") from None

    side = size + size // 7  # 256 for 224

    def decode(path):
        """uint8 (3, side, side), or what is wrong with the file."""
        try:
            with Image.open(path) as image:
                image.draft("RGB", (side, side))  # lets the JPEG decoder skip most of a large image
                image = image.convert("RGB")
            scale = side / min(image.size)
            width, height = (max(side, round(length * scale)) for length in image.size)
            left, top = (width - side) // 2, (height - side) // 2
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            return np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)
        except Exception as error:
            return f"{path}: {error or type(error).__name__}"

    src, out = Path(src), Path(out)
    of_split = {split: class_folders(src / split) for split in ("train", "val")}
    classes = list(of_split["train"])
    if foreign := of_split["val"].keys() - classes:
        raise ValueError(f"--src {src}: val has the class {min(foreign)}, which train has not")
    out.mkdir(parents=True, exist_ok=True)
    (out / "about.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="part-") as part:
        part = Path(part)
        for split, folders in of_split.items():
            paths = [(path, label) for label, name in enumerate(classes) for path in folders.get(name, ())]
            labels = []
            with (
                (part / f"{split}.npy").open("wb") as file,
                ThreadPoolExecutor() as pool,
                tqdm(total=len(paths), desc=split) as bar,
            ):
                write_header(file, len(paths), side)
                for begin in range(0, len(paths), 256):
                    some = paths[begin : begin + 256]
                    for (_, label), image in zip(some, pool.map(decode, (path for path, _ in some))):
                        bar.update()
                        if isinstance(image, str):
                            bar.write(f"left out: {image}")
                        else:
                            file.write(image.tobytes())
                            labels.append(label)
                file.seek(0)
                write_header(file, len(labels), side)  # numpy leaves room for a number of any length
            if lost := {label for _, label in paths} - set(labels):
                lost = classes[min(lost)]
                raise ValueError(f"--src {src}: in {split} the class folder {lost} has only broken images")
            np.save(part / f"{split}-labels.npy", np.array(labels, dtype=np.int64))
            broken = len(paths) - len(labels)
            print(f"{split}: {len(labels):,} images of {len(folders)} classes, {broken} broken ones left out")
        about = {"size": size, "side": side, "classes": classes}
        (part / "about.json").write_text(json.dumps(about) + "\n")
        for name in ("train", "train-labels", "val", "val-labels"):
            (part / f"{name}.npy").replace(out / f"{name}.npy")
        (part / "about.json").replace(out / "about.json")  # last: without it the arrays are not complete


def write_header(file, number, side):
    header = {"descr": "|u1", "fortran_order": False, "shape": (number, 3, side, side)}
    np.lib.format.write_array_header_1_0(file, header)


# ---- the command


def shape_of(name):
    """What a model must know of --data, where that is known without loading it, or None."""
    return {"classes": CIFAR[name].classes, "image": 32} if name in CIFAR else None


def load(name, folder=None, url=None, context=None, tests=1):
    """What --data, --data-dir and --data-url name: a Text or Images. Raises ValueError and OSError."""
    if name == "python":
        return python_text(folder, context or 128, tests)
    if name == "fineweb":
        return fineweb(folder or "datasets/fineweb", context or 1024, tests)
    if name == "imagenet":
        return imagenet(folder or "datasets/imagenet")
    return cifar(name, folder or "datasets", url)


def main():
    parser = Parser(description="Prepare data for train.py.", allow_abbrev=False)
    commands = parser.add_subparsers(
        dest="data", required=True, metavar="{cifar10,cifar100,imagenet,fineweb}"
    )
    for name in CIFAR:
        command = commands.add_parser(name, help="download, check and unpack it")
        command.add_argument("--data-dir", default="datasets", help="folder (default: datasets)")
        command.add_argument("--data-url", help="a mirror of the archive (default: the university's site)")
    command = commands.add_parser("imagenet", help="arrays of folders of JPEGs")
    command.add_argument("--src", required=True, help="folder with train/ and val/, each of class folders")
    command.add_argument("--size", type=at_least(16), default=224, help="pixels of a side (default: 224)")
    command.add_argument("--out", default="datasets/imagenet", help="folder (default: datasets/imagenet)")
    command = commands.add_parser("fineweb", help="download shards of 100 million tokens, 200 MB each")
    command.add_argument(
        "--shards", type=at_least(1), default=1, help="to train on, at most 103 (default: 1)"
    )
    command.add_argument("--data-dir", default="datasets/fineweb", help="folder (default: datasets/fineweb)")
    command.add_argument("--data-url", default=FINEWEB_URL, help=f"a mirror (default: {FINEWEB_URL})")
    args = parser.parse_args()
    try:
        if args.data == "fineweb":
            if args.shards > 103:
                raise ValueError(f"--shards {args.shards}: there are 103")
            download_fineweb(args.data_dir, args.shards, args.data_url)
            text = fineweb(args.data_dir, context=1)
            print(
                f"{sum(map(len, text.train)):,} tokens to train on, {sum(map(len, text.held_out)):,} held out"
            )
        elif args.data == "imagenet":
            make_imagenet(args.src, args.out, args.size)
        else:
            images = cifar(args.data, args.data_dir, args.data_url)
            print(f"{args.data}: {images.rows:,} images to train on, {images.tests:,} to test on")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
