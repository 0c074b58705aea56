"""What is learnt: text as bytes, cut into batches that depend only on (seed, step).

`python`: the .py files of the running Python's standard library, about 11 MB of real text that every machine
already has. No worker, process or mask enters the choice of a batch: every process computes the whole batch
of a step, and a worker takes its rows of it. So runs with other numbers of workers see the same data.

Needs numpy and torch. Read next: train.py, the loop that uses it.
"""

import hashlib
import os
import sysconfig
import zlib
from pathlib import Path

import numpy as np
import torch

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}  # folders
HELD_OUT = 13  # of 256, the share of the files that make the validation set


class Text:
    """Tokens to train on and tokens held out, each a 1-D integer array; `vocabulary` is the number of
    tokens."""

    def __init__(self, train, held_out, vocabulary):
        self.train, self.held_out, self.vocabulary = train, held_out, vocabulary

    def batch(self, seed, step, size, context):
        """The batch of a step: `size` random windows as (tokens, targets), each int64 (size, context)."""
        starts = np.random.default_rng([seed, step]).integers(0, len(self.train) - context, size)
        return windows(self.train, starts, context)

    def validation(self, number, context):
        """`number` evenly spaced windows of the held-out tokens, as (tokens, targets) like a batch."""
        starts = np.linspace(0, len(self.held_out) - context - 1, number).astype(np.int64)
        return windows(self.held_out, starts, context)

    def fingerprint(self):
        """A number by which processes find out whether they train on the same data."""
        return zlib.crc32(self.held_out, zlib.crc32(self.train))


def windows(tokens, starts, context):
    rows = torch.from_numpy(tokens[starts[:, None] + np.arange(context + 1)].astype(np.int64))
    return rows[:, :-1], rows[:, 1:]  # each (len(starts), context)


def python_text(folder=None):
    """The bytes of the .py files under `folder`, by default the standard library without its tests.

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
            f"a folder with dozens of .py files is needed, and there are {len(parts[False])} to train on and "
            f"{len(parts[True])} held out; the default is the standard library of the running Python"
        )
    return Text(train, held_out, vocabulary=256)
