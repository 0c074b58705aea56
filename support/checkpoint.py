"""What outlasts a run: checkpoints, written whole or not at all and read with suspicion, and log.jsonl."""

import json
import os
import pickle
import shutil
import tempfile
import zipfile
import zlib
from collections import defaultdict
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist

from data import DAMAGED
from masks import UserError
from model import CONFIGS, build
from support.peers import add_up, peers

FORMAT = 1  # of checkpoints
LATEST, PREVIOUS = "ckpt.pt", "ckpt.prev.pt"
FILES = ("log.jsonl", "summary.json", LATEST, PREVIOUS)  # of a run, in --out
# How far a run has come: updates, those skipped, and how many of the last ones; tokens or images; then of a
# worker, in the mean, FLOPs and bytes sent.
START = {"step": 0, "skipped": 0, "in_a_row": 0, "seen": 0, "flops": 0, "sent_bytes": 0}
USED_FLAGS = set("model size layers width heads hidden patch norm context data data_dir optimizer".split())
UNREADABLE = (*DAMAGED, AssertionError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, UserError)


@torch.no_grad()
def gather_state(engine):
    """The whole model, {name: tensor}, and its optimizer's state, {name: {key: tensor}}, in rank 0's CPU
    memory and at the owners' precision; empty on the others. Gathered bucket by bucket."""
    found = defaultdict(dict)  # {name: {key: tensor}}, with the key "" for the master copy
    with torch.device("meta"):
        shaped = engine.build({})
    for bucket in engine.buckets.values():
        mine, of_all = [], [()] * engine.processes
        for name, (where, piece) in bucket.pieces.items():
            for key, tensor in {"": piece, **engine.optimizer.state[piece]}.items():
                mine.append((name, key, where, tensor.to("cpu", copy=True)))
        with peers():
            dist.gather_object(mine, of_all if engine.rank == 0 else None)
        for name, key, where, tensor in chain(*of_all):
            if tensor.dim() == 0:  # the number of steps, which is the same for all
                found[name][key] = tensor
            else:
                whole = found[name].setdefault(key, tensor.new_empty(shaped.get_parameter(name).shape))
                whole.view(-1)[where] = tensor
    return {name: tensors.pop("") for name, tensors in found.items()}, dict(found)


@torch.no_grad()
def load_state(engine, model, optimizer):
    """Go on from what `gather_state` gave, which may be memory-mapped, on any processes and masks."""
    for bucket in engine.buckets.values():
        for name, (where, piece) in bucket.pieces.items():
            piece.copy_(model[name].flatten()[where])
            state = engine.optimizer.state[piece] = {}
            for key, tensor in optimizer.get(name, {}).items():
                own = tensor.flatten()[where].to(piece) if tensor.dim() > 0 else tensor.to(piece.device)
                state[key] = own.clone()  # not a part of the file


def save_file(content, path, previous=None):
    """torch.save(content, path), in whole or not at all. What was there is kept as `previous`."""
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            path.replace(previous)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save(engine, content, buffers, out):
    """Write a checkpoint of what an engine has, and `content`, into the folder of --out. All processes take
    part, and raise UserError where it cannot be written. buffers: further tensors of the model."""
    model, optimizer = gather_state(engine)
    content = {"format": FORMAT, **content, "model": model | buffers, "optimizer": optimizer}
    problem = ""
    if engine.rank == 0:
        try:
            with open(out / "log.jsonl", "a") as log:
                os.fsync(log.fileno())
            save_file(content, out / LATEST, previous=out / PREVIOUS)
        except (OSError, RuntimeError) as error:
            reason, free = " ".join(str(error).split())[:200], shutil.disk_usage(out).free / 1e6
            problem = f", {free:,.0f} MB are free there ({reason})"
    if any(add_up([bool(problem)])):
        raise UserError(f"--out {out}: step {content['progress']['step']} could not be saved{problem}")


def prepare_folder(args, saved, names=FILES):
    """Make the folder of --out. Raises UserError where it has another run, or cannot be written."""
    out, goes_on = Path(args.out), args.resume == "" or restarted() or (saved and saved["of_out"])
    try:
        if not (args.overwrite or goes_on) and any((out / name).exists() for name in names):
            raise UserError(f"--out {out}: has a run already; choose another folder, or --overwrite it")
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another") from None


def clear_folder(out, saved):
    """Remove what an earlier run has left in --out and this one does not go on from: a restart by torchrun
    would take it for its own. saved: the checkpoint to go on from, or None."""
    goes_on = saved and saved["of_out"]
    for name in ("summary.json",) if goes_on else FILES:
        (out / name).unlink(missing_ok=True)
    if goes_on and saved["path"].name == PREVIOUS:  # a damaged latest one must not take its place later
        saved["path"].replace(out / LATEST)


def open_log(out, saved):
    """log.jsonl to append to. What `clear_folder` has left is cut after the step of the checkpoint."""
    path, part = out / "log.jsonl", out / "log.jsonl.part"
    with part.open("w") as kept, suppress(FileNotFoundError, ValueError):  # power cuts leave half a line
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            if json.loads(line)["step"] <= saved["progress"]["step"]:
                kept.write(line)
    part.replace(path)
    return path.open("a")


def restarted():
    """Has torchrun started this process again, after one had failed?"""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def read_to_resume(resume, out):
    """The checkpoint to go on from, or None, as of `read_checkpoint`, with "of_out": does it lie in `out`?
    resume: --resume, which is "" where no file was named: then it is what is in `out`, if there is something.
    After a restart by torchrun that comes first. Raises UserError."""
    if resume == "" and not out:
        raise UserError("--resume: without a file, needs the --out that has one")
    first = (LATEST, PREVIOUS) if out and (resume == "" or restarted()) else ()
    path = next((Path(out, name) for name in first if Path(out, name).exists()), resume)
    if not path:
        return None
    saved = read_checkpoint(path, flag="--resume: ")
    return saved | {"of_out": bool(out) and saved["path"].resolve().parent == Path(out).resolve()}


def read_checkpoint(path, flag=""):
    """What `save` has written, memory-mapped, with "config" as an object, a "checksum" and the "path" of the
    file. path: that, or a folder with ckpt.pt. Raises UserError in one line where a file is anything else, or
    damaged. Nothing in it is executed."""
    path = Path(path, LATEST) if os.path.isdir(path) else Path(path)
    try:
        if not os.path.isfile(path):
            raise UserError("there is no such file")
        with zipfile.ZipFile(path) as archive:  # torch does not look at its checksums
            files = archive.infolist()
            if any(file.compress_type != zipfile.ZIP_STORED for file in files) or archive.testzip():
                raise UserError("it is damaged, or compressed")
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        config = check_content(saved)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{flag}{path}: is no checkpoint that can be read ({reason})") from error
    checksum = zlib.crc32(repr([file.CRC for file in files]).encode())
    return saved | {"config": config, "checksum": checksum, "path": path}


def check_content(saved):
    """Check that what was read fits together. Returns the model's config."""
    if "format" not in saved:
        raise UserError("it is no checkpoint of train.py, but perhaps what scripts.export has written")
    if saved["format"] != FORMAT:
        raise UserError(f"its format is {saved['format']}, not {FORMAT}")
    counts = [saved["fingerprint"], *(saved["progress"][key] for key in START)]
    if not USED_FLAGS <= saved["flags"].keys() or any(count < 0 for count in counts):
        raise UserError("it does not say how it was trained")
    if saved["config"].get("layers", 0) > len(saved["model"]):  # do not build what has no weights
        raise UserError("it has fewer weights than layers")
    with torch.device("meta"):
        model = build(CONFIGS[saved["flags"]["model"]](**saved["config"]))
    for name, parameter in model.named_parameters():
        state = saved["optimizer"][name] if saved["optimizer"] else {}
        tensors = [saved["model"][name], *(state[key] for key in state if key != "step")]
        if any(tensor.shape != parameter.shape for tensor in tensors):
            raise UserError(f"{name} has another shape")
    return model.config
