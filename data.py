"""Batches of text or of images, which depend on (seed, step) alone.

The default needs nothing prepared: it is Python's own library. --data text reads any text. Other --data
needs scripts/prepare.py first. Random numbers are drawn for a whole batch, and a worker
takes its rows of it: so batches depend on no masks. Needs masks.py. Read next: train.py.
"""

import hashlib
import json
import os
import struct
import sysconfig
import zlib
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
import torch.nn.functional as F

from masks import UserError

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}  # folders
KINDS = ("python", "text", "fineweb", "cifar10", "cifar100", "imagenet")  # what --data can be
TOKENS = 50257  # of GPT-2; a model for them has 50304, a multiple of 128
ARRAYS = ("train", "train-labels", "val", "val-labels")  # NAME.npy, as Images takes them
# What libraries raise where a file is not what they expect:
DAMAGED = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RecursionError,
           SyntaxError, TokenError, TypeError, ValueError, struct.error, zlib.error)  # fmt: skip


def load(name, folder=None, context=None, tests=1):
    """What --data names: Images, or a Text with `tests` validation windows."""
    try:
        if name == "python":  # 11 MB
            return read_bytes(folder or sysconfig.get_paths()["stdlib"], context or 128, tests, ".py")
        if name == "text":
            return read_bytes(folder or "datasets/text", context or 128, tests)
        if name == "fineweb":
            return read_fineweb(folder or "datasets/fineweb", context or 1024, tests)
        default = "datasets/imagenet" if name == "imagenet" else "datasets"
        return read_images(name, folder or default)
    except OSError as error:
        raise UserError(f"--data {name}: cannot be read ({error})") from None


def load_batches(data, engine, args, step):
    """{worker: (x, y)} of this process, by step and worker alone."""
    edges = np.cumsum([0, *args.rows]) * (args.batch_size // sum(args.rows))
    batches = {}
    for worker in engine.workers:
        which = slice(edges[worker], edges[worker + 1])
        batches[worker] = data.batch(args.seed, step, args.batch_size, which, engine.device)
    return batches


class Text:
    """Tokens to train on and tokens held out, in windows of `context` tokens.
    train, held_out: lists of 1-D integer arrays. No window crosses two of them.
    shape: fields of a model's config. outputs: tokens. epoch_size: windows of an epoch.
    tests: windows to validate. Raises UserError where an array is too short."""

    def __init__(self, train, held_out, vocabulary, context, tests=1):
        fewest = min(len(tokens) for tokens in (*train, *held_out))
        if fewest <= context:
            raise UserError(f"--context {context}: must be below {fewest}, the tokens that there are")
        self.train, self.held_out = train, held_out
        self.item, self.items = "token", "tokens"
        self.context = self.items_per_row = context
        self.outputs, self.tests = vocabulary, tests
        self.shape = {"vocabulary": vocabulary, "context": context}
        self.epoch_size = sum(len(tokens) for tokens in train) // context

    def batch(self, seed, step, size, which=slice(None), device="cpu"):
        """Rows `which` of a step's random windows: (tokens, targets), int64 (rows, context)."""
        count = sum(len(tokens) - self.context for tokens in self.train)
        numbers = np.random.default_rng([seed, step]).integers(0, count, size)
        return self._cut(self.train, numbers[which], device)

    def validation(self, which=slice(None), device="cpu"):
        """Rows of the evenly spaced held-out windows, like a batch."""
        count = sum(len(tokens) - self.context for tokens in self.held_out)
        numbers = np.linspace(0, count - 1, self.tests).astype(np.int64)
        return self._cut(self.held_out, numbers[which], device)

    def to(self, device):
        return self  # windows are cut on the CPU

    def fingerprint(self):
        """A checksum, to compare processes; of large arrays only their ends count."""
        checksum = 0
        for tokens in (*self.train, *self.held_out):
            if len(tokens) >= 2**25:
                tokens = np.concatenate([tokens[: 2**20], tokens[-(2**20) :]])
            checksum = zlib.crc32(tokens, checksum)
        return checksum

    def _cut(self, arrays, numbers, device):
        """The windows with those numbers, which go on from array to array."""
        first = np.cumsum([0] + [len(tokens) - self.context for tokens in arrays])
        array_of = np.searchsorted(first, numbers, side="right") - 1
        windows = np.empty((len(numbers), self.context + 1), dtype=np.int64)
        for window, a, begin in zip(windows, array_of, numbers - first[array_of]):
            window[:] = arrays[a][begin : begin + self.context + 1]  # with the last target
        windows = torch.from_numpy(windows).to(device)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def read_bytes(path, context=128, tests=1, ending=""):
    """A Text of a file's bytes, the last tenth held out, or of a folder's."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"--data-dir {path}: there is no such file or folder; name one")
    if path.is_file():
        tokens = np.fromfile(path, np.uint8)
        train, held_out = np.split(tokens, [len(tokens) * 9 // 10])
    else:
        train, held_out = read_folder(path, ending)
    if not len(train) or not len(held_out):
        needed = f"must be a file, or a folder with dozens of {ending or 'text'} files"
        raise UserError(f"--data-dir {path}: {needed}")
    return Text([train], [held_out], 256, context, tests)


def read_folder(root, ending):
    """(train, held_out), each uint8 (bytes,), of the files below a folder with this ending.
    A hash of a file's path in the folder decides what is held out, on any machine alike."""
    train, held_out = [], []
    for here, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - LEFT_OUT)  # in place, for os.walk
        for path in (Path(here, name) for name in sorted(files) if name.endswith(ending)):
            digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
            part = held_out if digest[0] < 13 else train  # 13 of 256
            part.append(path.read_bytes())
    return tuple(np.frombuffer(b"\n".join(part), np.uint8) for part in (train, held_out))


def read_fineweb(folder, context=1024, tests=1):
    """Web text (https://arxiv.org/abs/2406.17557) in GPT-2's tokens, of all *_train_*.bin and
    *_val_*.bin of a folder. Raises UserError where one is missing or damaged."""
    train = [read_shard(path) for path in sorted(Path(folder).glob("*_train_*.bin"))]
    held_out = [read_shard(path) for path in sorted(Path(folder).glob("*_val_*.bin"))]
    if not train or not held_out:
        remedy = f"run python -m scripts.prepare fineweb --data-dir {folder}"
        raise UserError(f"--data-dir {folder}: has no *_train_*.bin or no *_val_*.bin; {remedy}")
    return Text(train, held_out, 50304, context, tests)


def read_shard(path, every_token=False):
    """The tokens of a file in the format of https://github.com/karpathy/llm.c: uint16 after 256 int32,
    memory-mapped. Checks 1,000 tokens, or `every_token`. Raises UserError."""
    remedy = f"delete it and run python -m scripts.prepare fineweb --data-dir {path.parent}"
    size, header = path.stat().st_size, np.fromfile(path, "<i4", count=256).tolist()
    if size <= 1024 or header[:2] != [20240520, 1] or size != 1024 + 2 * header[2]:
        raise UserError(f"{path}: is not a complete shard ({size:,} bytes, header {header[:3]}); {remedy}")
    tokens = np.memmap(path, "<u2", mode="r", offset=1024)
    some = tokens if every_token else tokens[np.linspace(0, len(tokens) - 1, 1000).astype(int)]
    if some.max() >= TOKENS:
        raise UserError(f"{path}: has a token {some.max()}, beyond the {TOKENS} of GPT-2; {remedy}")
    return tokens


class Images:
    """Images to train on and to test on. Training sees random crops, the test central ones.
    train, test: uint8 (images, 3, side, side), also memory-mapped. labels, test_labels: int64
    (images,). size: pixels of a crop's side. mean, std: of channels, of 255. crop(rng, number, side):
    boxes, see _cut. The other attributes are those of a Text."""

    def __init__(self, train, labels, test, test_labels, classes, size, mean, std, crop):
        self.train, self.labels = train, labels
        self.test, self.test_labels = test, test_labels
        self.item, self.items, self.items_per_row = "image", "images", 1
        self.mean, self.std = torch.tensor([mean, std], dtype=torch.float32).view(2, 3, 1, 1)
        self.size, self.crop = size, crop
        self.shape, self.outputs = {"classes": classes, "image": size}, classes
        self.epoch_size, self.tests = len(train), len(test)

    def to(self, device):
        """Itself, on a GPU if the images fill at most half of what is free there."""
        size = self.train.nbytes + self.test.nbytes
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2:
            self.train, self.test = (torch.from_numpy(x).to(device) for x in (self.train, self.test))
        return self

    def batch(self, seed, step, size, which=slice(None), device="cpu"):
        """Rows `which` of random crops, float32 (rows, 3, self.size, self.size), and labels, int64 (rows,).
        Each epoch has another order."""
        places = [divmod(i, self.epoch_size) for i in range((step - 1) * size, step * size)]
        chosen = np.array([shuffled(seed, epoch, self.epoch_size)[place] for epoch, place in places])
        images = self._random_crops(np.random.default_rng([seed, step]), chosen, which, device)
        return images, torch.from_numpy(self.labels[chosen[which]]).to(device)

    def validation(self, which=slice(None), device="cpu"):
        """Rows of the test images, cropped centrally, and their labels."""
        chosen = np.arange(self.tests)[which]
        boxes = np.tile([0, 0, 1, 1], (len(chosen), 1)) * self.size / self.test.shape[-1]
        labels = torch.from_numpy(self.test_labels[chosen]).to(device)
        return self._cut(self.test, chosen, boxes, device), labels

    def calibration(self, seed, number, which=slice(None), device="cpu"):
        """Rows of `number` training images, to estimate batch norms."""
        rng = np.random.default_rng([seed, 0])  # no step of training has the number 0
        chosen = rng.choice(self.epoch_size, number, replace=number > self.epoch_size)
        return self._random_crops(rng, chosen, which, device)

    def fingerprint(self):
        """A checksum of all labels and of 50 images: ImageNet is large."""
        checksum = zlib.crc32(self.test_labels, zlib.crc32(self.labels))
        for images in (self.train, self.test):
            for place in np.linspace(0, len(images) - 1, 50).astype(int):
                checksum = zlib.crc32(np.ascontiguousarray(images[place]), checksum)
        return checksum

    def _random_crops(self, rng, chosen, which, device):
        """Rows of the chosen images, cropped at random, about half of them mirrored."""
        boxes = self.crop(rng, len(chosen), self.train.shape[-1])
        boxes[:, 2] *= rng.choice([-1, 1], len(chosen))
        return self._cut(self.train, chosen[which], boxes[which], device)

    def _cut(self, images, chosen, boxes, device):
        """Boxes (rows, 4) of the chosen images: centre x, y and scales x, y; an image is from -1 to 1.
        A negative scale mirrors. What lies outside gets the mean colour."""
        x = torch.as_tensor(images)[torch.from_numpy(chosen)].to(device)
        x = (x.float() - self.mean.to(device)) / self.std.to(device)
        centre, scale = torch.from_numpy(boxes).to(x).split(2, dim=1)
        theta = torch.cat([scale.diag_embed(), centre[:, :, None]], dim=2)  # (rows, 2, 3)
        grid = F.affine_grid(theta, (len(x), 3, self.size, self.size), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)  # float32 (rows, 3, size, size)


@lru_cache(2)  # a batch reaches into two epochs at most, unless it is larger than one
def shuffled(seed, epoch, epoch_size):
    """The order of the images in an epoch: int64 (epoch_size,)."""
    return np.random.default_rng([seed, epoch, 1]).permutation(epoch_size)


def shifted(rng, number, side):
    """Boxes (number, 4) for small images: moved by up to an eighth, 4 of 32 pixels."""
    pixels = rng.integers(-(side // 8), side // 8 + 1, (number, 2))
    return np.column_stack([pixels * 2 / side, np.ones((number, 2))])


def resized(rng, number, side):
    """Boxes (number, 4) as of Inception (arXiv 1409.4842), 3/4 to 4/3 as wide as high."""
    area = rng.uniform(0.25, 1, number)  # the share that is seen; Inception begins at 0.08
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), number))
    scale = np.minimum(1, np.sqrt(np.column_stack([area * ratio, area / ratio])))
    return np.column_stack([rng.uniform(-1, 1, (number, 2)) * (1 - scale), scale])


def read_images(name, data_dir):
    """Images as scripts/prepare.py has written them, memory-mapped. Raises UserError."""
    if name == "imagenet":
        folder, options = Path(data_dir), f"--src DIR --out {data_dir}"
        mean, std, crop = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4), resized
    else:
        folder, options = Path(data_dir, name), f"--data-dir {data_dir}"
        mean, std, crop = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7), shifted
    try:
        about = json.loads((folder / "about.json").read_text())
        size, side, classes = int(about["size"]), about["side"], len(about["classes"])
        arrays = [np.lib.format.open_memmap(folder / f"{file}.npy", mode="c") for file in ARRAYS]
        check_images(*arrays[:2], side, classes)
        check_images(*arrays[2:], side, classes)
        if not 0 < size <= side:
            raise ValueError(f"about.json has the size {size} for images of {side} pixels")
    except DAMAGED as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        remedy = f"run python -m scripts.prepare {name} {options}"
        raise UserError(f"{folder}: has no complete arrays of images ({reason}); {remedy}") from None
    return Images(*arrays, classes, size, mean, std, crop)


def check_images(images, labels, side, classes):
    """Raises ValueError unless uint8 (n, 3, side, side), and int64 (n,) below `classes`."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape != (*labels.shape, 3, side, side):
        raise ValueError(f"images of {images.dtype} {images.shape} for {labels.shape} labels, {side} pixels")
    if labels.dtype != np.int64 or not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels that are not those of {classes} classes")
