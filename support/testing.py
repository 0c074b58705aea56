"""Small data for the tests of all folders. A test module gets the fixtures by this line:

pytest_plugins = ["support.testing"]

PYTEST_DONT_REWRITE: so pytest does not warn where a test module also imports helpers from here.
"""

import argparse
import http.server
import json
import threading
from pathlib import Path

import numpy as np
import pytest

import data

SAMPLES = Path(__file__).parents[2] / "shared" / "data"  # real images, which a user's checkout does not have
needs_images = pytest.mark.skipif(
    not SAMPLES.exists(), reason="the sample images in ../shared/data are absent"
)


# ---- text


def write_shard(path, tokens, magic=20240520, version=1, number=None):
    """A file of tokens as llm.c writes them."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if number is None else number
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture
def shards(tmp_path):
    """The Path of a folder with shards: 1,000 and 500 tokens to train on, 300 to validate."""
    folder, rng = tmp_path / "fineweb", np.random.default_rng(0)
    folder.mkdir()
    for name, number in (("train_000001", 1000), ("train_000002", 500), ("val_000000", 300)):
        write_shard(folder / f"fineweb_{name}.bin", rng.integers(0, data.TOKENS, number))
    return folder


# ---- images


def some_images(number=20, size=8, crop=data.shifted):
    """Images of noise in 5 classes, the same to train on and to test on."""
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (number, 3, size, size), dtype=np.uint8)
    labels = rng.integers(0, 5, number)
    return data.Images(images, labels, images, labels, 5, size, (127.5,) * 3, (1.0,) * 3, crop)


def write_images(folder, train, test, side=32, classes=10, size=None):
    """A folder of arrays as scripts/prepare.py writes them: noise, with the labels 0, 1, 2, 0, ..."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, number in (("train", train), ("val", test)):
        np.save(folder / f"{name}.npy", rng.integers(0, 256, (number, 3, side, side), dtype=np.uint8))
        np.save(folder / f"{name}-labels.npy", np.arange(number) % 3)
    about = {"size": size or side, "side": side, "classes": list(range(classes))}
    (folder / "about.json").write_text(json.dumps(about))


@pytest.fixture
def small_cifar(tmp_path):
    """The Path of a folder, for --data-dir, with 15 training and 3 test images of CIFAR-10."""
    write_images(tmp_path / "small" / "cifar10", train=15, test=3)
    return tmp_path / "small"


# ---- damaged files


def mutations(good, number, rng):
    """Copies of a file's bytes with what happens to files: cut off, bytes changed, blocks lost or doubled."""
    for _ in range(number):
        content, (a, b) = bytearray(good), np.sort(rng.integers(0, len(good), 2))
        match rng.integers(5):
            case 0:
                content = content[:a]
            case 1:
                content[a : a + 4] = rng.bytes(4)
            case 2:
                del content[a:b]
            case 3:
                content[a:a] = content[a:b]
            case 4:  # where headers and pickles have their numbers and names
                for place in rng.integers(0, min(len(good), 300), 3):
                    content[place] = rng.integers(256)
        yield bytes(content)


# ---- downloads


@pytest.fixture
def web(tmp_path):
    """A server that can begin in the middle of a file: its folder, its url, and what it was asked."""
    folder, asked = tmp_path / "web", []
    folder.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Range"]))
            path, begin = folder / self.path[1:], int((self.headers["Range"] or "bytes=0-")[6:-1])
            content = path.read_bytes()[begin:] if path.exists() else b""
            status = 206 if begin else 200
            if not content:
                status = 416 if path.exists() else 404
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield argparse.Namespace(folder=folder, url=f"http://localhost:{server.server_port}/", asked=asked)
        server.shutdown()
