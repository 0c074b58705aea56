"""Checkpoints: resuming is exact, nothing is lost unasked, and nothing bad is believed or executed.

SLOW=1 in the environment reads ten times as many mutated files.
"""

import io
import os
import re
import resource
import shutil
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data
import masks
import train
from masks import UserError
from model import cross_entropy
from scripts.export import load_model
from sdp import SDP
from support import checkpoint, evaluation
from support.checkpoint import LATEST, PREVIOUS, read_checkpoint
from support.processes import HANGS, TINY, assert_same_checkpoint, read_log, read_summary, slow, warm
from support.testing import mutations, write_images

pytest_plugins = ["support.testing", "support.processes"]

MUTATED = 200 if "SLOW" in os.environ else 20  # files
RESNET = "--model resnet18 --width 8 --batch-size 8".split()
WILD = "--lr 1e30 --grad-clip 0 --warmup 0".split()  # after the first step nothing is finite


def run(*flags):
    train.main([str(flag) for flag in flags])


def last_steps(out):
    return [read_checkpoint(out / name)["progress"]["step"] for name in (LATEST, PREVIOUS)]


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the trained run, to be changed."""
    return shutil.copytree(trained, tmp_path / "copied")


@pytest.fixture
def few_images(monkeypatch, small_cifar):
    """Flags of a small ResNet, whose batch norm is estimated on few images."""
    monkeypatch.setattr(evaluation, "IMAGES", 16)
    return [*RESNET, "--data-dir", small_cifar]


# ---- resuming

CHANGING = "--mask forward --resample 2 --finish 0.34 --drop-path 0.2".split()


@pytest.mark.parametrize(
    "model, dtype, more",
    [
        pytest.param("gpt", "float32", [], marks=slow),
        ("gpt", "bfloat16", CHANGING),
        ("resnet18", "float32", CHANGING),
    ],
    ids=["gpt", "gpt-bfloat16-changing", "resnet18-changing"],
)
def test_resume_is_bit_for_bit(alone, tmp_path, few_images, model, dtype, more):
    """From the checkpoint before the last, with a line in the log that was never finished."""
    at_once, later = tmp_path / "at once", tmp_path / "later"
    flags = [*(TINY if model == "gpt" else few_images), "--mask", "backward", "--units", "neuron"]
    flags += ["--workers", 2, "--dtype", dtype, *more, "--steps", 6, "--save-every", 2, "--eval-every", 3]
    run(*flags, "--out", at_once)
    shutil.copytree(at_once, later)
    (later / LATEST).unlink()
    with (later / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo\n\0\0')  # as after a power cut
    run(*flags, "--out", later, "--resume")
    assert last_steps(later) == [6, 4]
    assert_same_checkpoint(later / LATEST, at_once / LATEST)
    assert [entry["step"] for entry in read_log(later)] == [1, 2, 3, 4, 5, 6]
    assert read_log(later) == read_log(at_once)
    expected, found = read_summary(at_once), read_summary(later)
    assert found["final_val_loss"] == expected["final_val_loss"]
    assert [(phase["mask"], phase["steps"]) for phase in found["phases"]] == [("backward", 2)]
    assert found["phases"][0]["per_worker"] == expected["phases"][-1]["per_worker"]


@pytest.mark.parametrize("damage", ["missing", "damaged", "damaged, and the older one is named"])
def test_resume_takes_the_older_checkpoint(refused, capsys, copied, damage):
    """After resuming, both that are left can be read."""
    before = (copied / PREVIOUS).read_bytes()
    flags = [*TINY, "--steps", 4, "--save-every", 0, "--out", copied, "--resume"]
    if damage == "missing":
        (copied / LATEST).unlink()
    else:
        (copied / LATEST).write_bytes(b"damaged")
        assert LATEST in refused(*flags)  # the user is to decide
        flags.append(copied / PREVIOUS)
        if damage == "damaged":
            (copied / LATEST).unlink()
            flags.pop()
    run(*flags)
    assert "after step 2" in capsys.readouterr().out
    assert last_steps(copied) == [4, 2] and (copied / PREVIOUS).read_bytes() == before


def test_a_restart_before_the_first_checkpoint_begins_again_where_it_began(trained, tmp_path, monkeypatch):
    """With --resume FILE; but what is in --out comes first."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    earlier, out = trained / "ckpt.prev.pt", tmp_path / "out"
    out.mkdir()
    assert checkpoint.read_to_resume(str(earlier), str(out))["path"] == earlier
    assert checkpoint.read_to_resume(str(trained), str(out))["path"] == trained / "ckpt.pt"  # by its folder
    shutil.copy(trained / "ckpt.pt", out)
    assert checkpoint.read_to_resume(str(earlier), str(out))["path"] == out / "ckpt.pt"


def test_resume_begins_where_there_is_nothing(alone, monkeypatch, capsys, tmp_path):
    out = tmp_path / "run"
    run(*TINY, "--steps", 2, "--out", out, "--resume")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert {path.name for path in before} == {LATEST, "log.jsonl", "summary.json"}
    validated = re.search(r"step 2: val_loss .* accuracy [0-9.]+", capsys.readouterr().out)[0]
    run(*TINY, "--steps", 2, "--out", out, "--resume")  # nothing is left to be done, and nothing changes
    printed = capsys.readouterr().out
    assert "nothing to train" in printed and validated in printed
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # as of a process that torchrun has started again
    run(*TINY, "--steps", 3, "--dtype", "float64", "--out", out)
    assert "after step 2" in capsys.readouterr().out
    assert [entry["step"] for entry in read_log(out)] == [1, 2, 3]


def test_resume_counts_on(alone, tmp_path, trained):
    """Tokens are those that were seen, whatever the batch was. A new --out has its own log."""
    before, out = read_log(trained)[-1], tmp_path / "more"
    flags = ["--resume", trained / LATEST, "--eval-batches", 2, "--steps", 5, "--save-every", 0]
    run(*flags, "--batch-size", 16, "--out", out)
    log = read_log(out)
    assert [entry["tokens"] for entry in log] == [3 * 8 * 32 + 16 * 32, 3 * 8 * 32 + 2 * 16 * 32]
    costs = read_summary(out)["per_worker"]
    for key, of_step in (("flops", np.mean([row["flops"] for row in costs])), ("sent_bytes", 0)):
        assert log[1][key] - log[0][key] == pytest.approx(of_step, abs=1)
        assert log[0][key] - before[key] == pytest.approx(of_step, abs=1)


@pytest.mark.parametrize("model", ["gpt", "resnet18"])
def test_checkpoint_holds_the_whole_model(alone, tmp_path, trained, few_images, small_cifar, model):
    """Read by the dense model alone, it has the loss that was logged."""
    out = trained
    if model == "resnet18":
        out = tmp_path / "run"
        run(*few_images, "--mask", "forward", "--steps", 2, "--out", out)
    folder = None if model == "gpt" else small_cifar
    of_training = data.load("python" if model == "gpt" else "cifar10", folder, context=32, tests=16)
    x, y = of_training.validation()
    loss = cross_entropy(load_model(out / LATEST)(x), y).item()
    assert loss == pytest.approx(read_summary(out)["final_val_loss"], abs=1e-5)


BAD_RESUMES = [  # flags, what the one line must say
    ("--resume CKPT --model vit", ("--model vit", "gpt")),
    ("--resume CKPT --size 10m", ("--size 10m", "leave it out")),
    ("--resume CKPT --layers 3", ("--layers 3", "trained with 2")),
    ("--resume CKPT --width 64", ("--width 64", "trained with 32")),
    ("--resume CKPT --heads 2", ("--heads 2", "leave it out")),
    ("--resume CKPT --hidden 64", ("--hidden 64", "trained with 32")),
    ("--resume CKPT --context 64", ("--context 64", "trained with 32")),
    ("--resume CKPT --data fineweb", ("--data fineweb", "trained with python")),
    ("--resume CKPT --optimizer sgd", ("--optimizer sgd", "trained with adamw")),
    ("--resume CKPT --norm batch", ("--norm batch",)),
    ("--resume CKPT --steps 2", ("--steps 2", "has 3 already")),
    ("--resume CKPT --steps 5 --out OUT", ("--out", "--overwrite")),
    ("--resume OUT/nothing", ("--resume", "no such file")),
    ("--resume", ("--resume", "--out")),
]


@pytest.mark.parametrize("flags, says", BAD_RESUMES, ids=[flags for flags, _ in BAD_RESUMES])
def test_bad_resumes_end_with_one_line(refused, trained, copied, flags, says):
    before = {path: path.read_bytes() for path in copied.iterdir()}
    line = refused(*flags.replace("CKPT", str(trained / LATEST)).replace("OUT", str(copied)).split())
    assert all(words in line for words in says), line
    assert before == {path: path.read_bytes() for path in copied.iterdir()}


def test_resume_with_other_classes(refused, tmp_path, few_images):
    """The same --data, but in a folder that holds images of fewer classes."""
    run(*few_images, "--steps", 1, "--out", tmp_path / "run")
    write_images(tmp_path / "other" / "cifar10", train=15, test=3, classes=5)
    line = refused("--resume", tmp_path / "run" / LATEST, "--data-dir", tmp_path / "other", "--steps", 2)
    assert "--data-dir" in line and "classes 5" in line


# ---- what is there is not lost


def test_out_is_not_overwritten_unasked(refused, tmp_path):
    flags = [*TINY, "--steps", 1, "--out", tmp_path]
    run(*flags)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "--overwrite" in refused(*flags)
    if not torch.cuda.is_available():  # what is found wrong later does not cost the old run
        assert "--device cuda" in refused(*flags, "--overwrite", "--device", "cuda")
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    run(*TINY, "--steps", 2, "--out", tmp_path, "--overwrite")
    assert len(read_log(tmp_path)) == 2 and not (tmp_path / PREVIOUS).exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, which has no room")
def test_the_disk_is_full(refused, monkeypatch, tmp_path):
    """From the second checkpoint on. The first one stays, and nothing half-written."""
    really_save_file = checkpoint.save_file

    def save_file(content, path, previous):
        if content["progress"]["step"] > 3:
            path.with_name(f"{LATEST}.part").symlink_to("/dev/full")
        really_save_file(content, path, previous)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    line = refused(*TINY, "--steps", 9, "--save-every", 3, "--out", tmp_path)
    assert "step 6 could not be saved" in line and "MB are free" in line
    assert read_checkpoint(tmp_path / LATEST)["progress"]["step"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "log.jsonl"]


# ---- steps that are not finite


def three_steps(folder, bad):
    """Three steps, of which rank 1 sees `bad` pixels in the second. Returns the state after each, on rank 0,
    and whether the loss and the gradient were finite."""
    flags = "--model vit --layers 2 --width 32 --hidden 32 --batch-size 8 --workers 2 --dtype float32".split()
    args, _ = train.parse([*flags, "--data-dir", str(folder)], train.make_parser())
    plan = train.make_plan(args, None, masks.assign)
    engine = train.make_engine(plan, plan.draw_mask(0), "backward", torch.device("cpu"), SDP)
    states, finite = [], []
    for step in (1, 2, 3):
        batches = data.load_batches(plan.data, engine, args, step)
        if step == 2 and dist.get_rank() == 1:
            batches[1][0][0, 0, 0, 0] = bad
        norm, loss, _ = train.update(engine, batches, args, step, 1e-2)
        finite.append(bool(np.isfinite(norm + loss)))
        model, optimizer = checkpoint.gather_state(engine)
        tensors = {(name, key): t for name, of in optimizer.items() for key, t in of.items()}
        states.append({name: tensor.clone() for name, tensor in (model | tensors).items()})
    return states, finite


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_is_skipped(in_processes, small_cifar, bad):
    """By all processes: the model and the optimizer stay as they were, and the next step is a good one."""
    (states, finite), (_, also) = in_processes(2, three_steps, small_cifar, bad)
    assert finite == also == [True, False, True]
    first, second, third = states
    assert first.keys() == second.keys() and len(first) > 10
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(tensor.isfinite().all() for tensor in third.values())
    assert not torch.equal(second["head.weight"], third["head.weight"])


def test_ten_steps_that_are_not_finite_end_the_run(refused, tmp_path):
    """They may be of two runs. The log has no NaN, and the checkpoint is still good."""
    flags = [*TINY, *WILD, "--save-every", 1, "--eval-every", 5, "--out", tmp_path]
    run(*flags, "--steps", 8)  # the last seven of these are skipped
    assert read_summary(tmp_path)["skipped_steps"] == 7
    line = refused(*flags, "--steps", 50, "--resume")
    assert "--lr" in line and "10 steps in a row, up to step 11" in line
    log = read_log(tmp_path)
    assert [entry.get("skipped") for entry in log] == [None, *range(1, 11)]
    assert log[-1]["loss"] is None and "NaN" not in (tmp_path / "log.jsonl").read_text()
    saved = read_checkpoint(tmp_path / LATEST)
    assert saved["progress"]["step"] == 10 and saved["progress"]["skipped"] == 9
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


# ---- bad checkpoints


class Evil:
    """What would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def repacked(content, change=bytes, compression=zipfile.ZIP_STORED):
    """A checkpoint's bytes with a changed pickle in it, and the right checksums."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w", compression) as new:
        for entry in old.infolist():
            of_entry = old.read(entry)
            new.writestr(entry.filename, change(of_entry) if entry.filename.endswith(".pkl") else of_entry)
    return result.getvalue()


def saved_as(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def with_changes(**changes):
    """A function that makes of a checkpoint's bytes those of one in which some entries are others."""
    return lambda content, _: saved_as(torch.load(io.BytesIO(content)) | changes)


def with_moments_of_no_shape(content, _):
    saved = torch.load(io.BytesIO(content))
    saved["optimizer"] = {name: {"exp_avg": torch.zeros(())} for name in saved["optimizer"]}
    return saved_as(saved)


def without_flags(content, _):
    saved = torch.load(io.BytesIO(content))
    saved["flags"] = {name: saved["flags"][name] for name in ("model", "data", "data_dir")}
    return saved_as(saved)


BAD_CHECKPOINTS = {  # how the bytes come about, from those of a good one and a path that is not to be written
    "truncated": lambda content, _: content[: len(content) // 2],
    "empty": lambda *_: b"",
    "text": lambda *_: b"step,loss\n1,2\n",
    "a byte": lambda content, _: flipped(content, len(content) // 2),
    "its first byte": lambda content, _: flipped(content, 0),
    "compressed": lambda content, _: repacked(content, compression=zipfile.ZIP_DEFLATED),
    "weights alone": lambda *_: saved_as({"w": torch.zeros(3)}),
    "no dictionary": lambda *_: saved_as([1, 2]),
    "a later format": with_changes(format=2),
    "a step before the first": with_changes(progress=checkpoint.START | {"step": -1}),
    "no progress": with_changes(progress={"step": 1}),
    "no data": with_changes(flags={"model": "gpt"}),
    "few flags": without_flags,
    "another shape": with_changes(model={"head.weight": torch.zeros(2, 2)}),
    "half an optimizer": with_changes(optimizer={"head.weight": {"step": torch.tensor(1.0)}}),
    "moments of no shape": with_moments_of_no_shape,
    "a class": lambda _, path: saved_as(Evil(path)),
    "a class among the rest": lambda content, path: with_changes(fingerprint=Evil(path))(content, path),
}


@pytest.mark.parametrize("damage", BAD_CHECKPOINTS)
def test_bad_checkpoints_end_with_one_line(refused, tmp_path, trained, damage):
    """And nothing in them is executed."""
    path, evil = tmp_path / LATEST, tmp_path / "evil"
    path.write_bytes(BAD_CHECKPOINTS[damage]((trained / LATEST).read_bytes(), evil))
    assert str(path) in refused("--resume", path)
    assert not evil.exists()


def read_mutated(content, path):
    """How many mutated files were read, and how many were refused; and by how much the memory grew."""
    rng, counts = np.random.default_rng(0), Counter()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        good_pickle = next(archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))
    huge_memo = b"\x80\x02}r" + (2**28).to_bytes(4, "little") + b"."  # asks for a gigabyte
    pickles = [huge_memo, *mutations(good_pickle, MUTATED, rng)]
    files = [*mutations(content, MUTATED, rng), *(repacked(content, lambda _: each) for each in pickles)]
    read_checkpoint(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file in files:
        path.write_bytes(file)
        try:
            read_checkpoint(path)
            counts["read"] += 1
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error), error
            counts["refused"] += 1
    return counts, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_mutated_checkpoints_are_read_or_refused_in_one_line(tmp_path, trained):
    """In little memory, in a process of their own. Where only the pickle is mutated, checksums are right."""
    path = Path(shutil.copy(trained / LATEST, tmp_path))
    with ProcessPoolExecutor(1, mp_context=warm) as pool:
        counts, grown = pool.submit(read_mutated, path.read_bytes(), path).result(timeout=HANGS)
    assert counts.total() == 2 * MUTATED + 1 and counts["refused"] > MUTATED
    assert grown < 50e6
