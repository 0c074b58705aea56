"""What every run sees: batches that depend on the seed and the step alone."""

import numpy as np
import pytest
import torch

import data
from data import Text, load
from support.testing import some_images, write_shard

pytest_plugins = ["support.testing", "support.processes"]


def test_data_text_depends_on_seed_and_step_alone():
    text = load("python", context=16, tests=3)
    (train_tokens,), (held_out,) = text.train, text.held_out
    assert 5e6 < len(train_tokens) and 2e5 < len(held_out) < 0.2 * len(train_tokens)
    x, y = text.batch(seed=1, step=2, size=8)
    assert x.shape == y.shape == (8, 16) and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, load("python", context=16).batch(1, 2, 8)[0])
    assert torch.equal(x[2:4], text.batch(1, 2, 8, slice(2, 4))[0])
    assert not torch.equal(x, text.batch(1, 3, 8)[0]) and not torch.equal(x, text.batch(2, 2, 8)[0])
    last = Text([np.arange(17, dtype=np.uint8)], [np.arange(17, dtype=np.uint8)], 256, context=16, tests=3)
    assert torch.equal(last.batch(0, 1, 3)[1][:, -1], torch.full((3,), 16))
    assert torch.equal(last.validation()[0][:, 0], torch.zeros(3, dtype=torch.int64))


def test_data_split_does_not_depend_on_where_the_folder_lies(tmp_path):
    for here in (tmp_path / "a", tmp_path / "b"):
        for number in range(100):
            (here / f"pack{number % 3}").mkdir(parents=True, exist_ok=True)
            (here / f"pack{number % 3}" / f"{number}.py").write_text(f"print({number})")
        (here / "tests").mkdir()
        (here / "tests" / "left_out.py").write_text("never read")
    a, b = (load("python", tmp_path / name, context=8) for name in "ab")
    assert a.fingerprint() == b.fingerprint() and len(a.held_out[0]) > 0
    assert b"never read" not in a.train[0].tobytes() + a.held_out[0].tobytes()
    (tmp_path / "a" / "notes.txt").write_text("any text")
    a, text = load("python", tmp_path / "a", context=8), load("text", tmp_path / "a", context=8)
    assert a.fingerprint() == b.fingerprint()
    assert b"any text" in text.train[0].tobytes() + text.held_out[0].tobytes()


def test_data_text_of_one_file_holds_out_its_last_tenth(tmp_path):
    (tmp_path / "play.txt").write_bytes(bytes(range(200)))
    text = load("text", tmp_path / "play.txt", context=8)
    assert [part.tolist() for part in text.train + text.held_out] == [list(range(180)), list(range(180, 200))]


def test_data_windows_lie_in_one_shard(shards):
    text = load("fineweb", shards, context=99)
    assert text.shape == {"vocabulary": 50304, "context": 99} and text.epoch_size == 1500 // 99
    assert all(isinstance(tokens, np.memmap) for tokens in text.train)
    read = [np.fromfile(path, "<u2")[512:] for path in sorted(shards.glob("*train*"))]
    possible = {tokens[i : i + 99].tobytes() for tokens in read for i in range(len(tokens) - 99)}
    x, y = text.batch(0, 1, 30_000)
    assert {row.tobytes() for row in x.numpy().astype("<u2")} == possible  # all of 901 + 401, and no others
    assert torch.equal(x[:, 1:], y[:, :-1])
    checksum = text.fingerprint()
    assert load("fineweb", shards, context=99).fingerprint() == checksum
    write_shard(shards / "fineweb_train_000002.bin", [1] * 500)
    assert load("fineweb", shards, context=99).fingerprint() != checksum


@pytest.mark.parametrize("crop", [data.shifted, data.resized])
def test_data_images_depend_on_seed_and_step_alone(crop):
    images = some_images(crop=crop)
    x, y = images.batch(0, 2, 16)
    assert x.shape == (16, 3, 8, 8) and y.shape == (16,)
    for which in (slice(0, 4), slice(4, 16)):
        assert all(map(torch.equal, images.batch(0, 2, 16, which), (x[which], y[which])))
        calibration = images.calibration(0, 16)
        assert torch.equal(images.calibration(0, 16, which), calibration[which])
    assert not torch.equal(x, images.batch(1, 2, 16)[0]) and not torch.equal(x, images.batch(0, 3, 16)[0])
    assert not torch.equal(calibration, images.calibration(1, 16))
    assert images.calibration(0, 50).shape == (50, 3, 8, 8)  # of 20 images


def test_data_epochs_go_through_all_images():
    images = some_images()
    images.labels = np.arange(20)
    seen = torch.cat([images.batch(0, step, 16)[1] for step in range(1, 6)])  # 80 = 4 epochs
    assert all(torch.equal(epoch.sort().values, torch.arange(20)) for epoch in seen.split(20))
    assert not torch.equal(seen[:20], seen[20:40])


def test_data_crops_by_hand():
    """Moved by whole pixels, mirrored, outside the mean colour."""
    images = some_images()
    original = torch.from_numpy(images.train[:1]).float() - 127.5
    boxes = np.array([[0, 0, 1, 1], [0, 0, -1, 1], [0.25, -0.5, 1, 1]])
    x = images._cut(images.train, np.zeros(3, int), boxes, "cpu")
    expected = torch.zeros(1, 3, 8, 8)
    expected[:, :, 2:, :7] = original[:, :, :6, 1:]  # a quarter of 1 is one of 8 pixels; half, two
    torch.testing.assert_close(x, torch.cat([original, original.flip(3), expected]), rtol=0, atol=1e-2)
    torch.testing.assert_close(images.validation(slice(0, 1))[0], original, rtol=0, atol=1e-2)
    images.size = 4  # of 8: the centre
    torch.testing.assert_close(images.validation(slice(0, 1))[0], original[:, :, 2:6, 2:6], rtol=0, atol=1e-2)
    boxes = data.shifted(np.random.default_rng(0), 1000, 32)
    assert set(np.unique(boxes[:, :2] * 16)) == set(range(-4, 5)) and (boxes[:, 2:] == 1).all()
    boxes = data.resized(np.random.default_rng(0), 1000, 256)
    assert (abs(boxes[:, :2]) + boxes[:, 2:] <= 1 + 1e-9).all() and boxes[:, 2:].min() > 0.4
