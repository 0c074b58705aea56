"""Run the arms of an experiment, and print its table: python -m results.experiments repeated --jobs 2

An arm is tuned first: in each of its rounds, flags are tried on top of the best so far, with one seed and one
text to validate. The best flags of all then run with three seeds, and are validated on a second text, which
no choice has used. Each run leaves a file in results/NAME, and a run whose file is there is skipped. Where an
arm has several members, each seed stands for as many runs."""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import ARRAYS, LEFT_OUT, load, read_images
from masks import UserError
from scripts.export import load_model
from scripts.plot import COST_KEYS, read_out
from scripts.prepare import new_arrays
from support.launch import at_least, make_parser

TUNING_SEED, SEEDS = 100, (0, 1, 2)  # of the runs that choose flags, and of those that are reported
TRAIN = Path(__file__).parents[1] / "train.py"


class Arm(NamedTuple):
    flags: str
    rounds: tuple  # of tuning: in each, one of several flags may be added
    members: int = 1  # models that are trained apart, and whose predictions are averaged


class Experiment(NamedTuple):
    prepare: Callable  # of a folder: writes the data of the parts "tune" and "report" into it
    data: str  # flags that name the data of a {part}
    flags: str  # of all arms
    arms: dict  # {name: Arm}; the table has costs in parts of those of "dense"
    score: str = "loss"  # what is to be low; or "error", the share of images that are classified wrongly


def write_texts(folder, source, size=None):
    """Write tune.txt and report.txt, for --data text: the same nine parts of bytes to train on, then another
    part each, which is held out. source: a folder of Python's standard library, whose .py files are learnt,
    in the order of a hash of their paths; size: how many bytes, by default all. Raises UserError."""
    root = Path(sysconfig.get_paths()["stdlib"], source)
    paths = [path for path in root.rglob("*.py") if not LEFT_OUT & {*path.relative_to(root).parts}]
    if not paths:
        raise UserError(f"{root}: is not in this version of Python; use 3.11 or 3.12")
    paths.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    text = b"\n".join(path.read_bytes() for path in paths)[:size]
    part = len(text) // 11
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tune.txt").write_bytes(text[: 10 * part])
    (folder / "report.txt").write_bytes(text[: 9 * part] + text[10 * part : 11 * part])


def write_images(folder):
    """Write tune/cifar10 and report/cifar10: the same nine tenths of CIFAR-10's training images, and to test
    on the rest of these, or the official test images. Raises UserError where CIFAR-10 is not prepared."""
    read_images("cifar10", "datasets")  # raises where they are damaged
    train, labels, test, test_labels = (np.load(f"datasets/cifar10/{name}.npy") for name in ARRAYS)
    size = len(train) * 9 // 10
    held_out = {"tune": (train[size:], labels[size:]), "report": (test, test_labels)}
    for part, to_test_on in held_out.items():
        with new_arrays(folder / part / "cifar10", 32, 32, range(10)) as out:
            for name, array in zip(ARRAYS, (train[:size], labels[:size], *to_test_on)):
                np.save(out / f"{name}.npy", array)


# Rounds of tuning.
DECAY = ("--weight-decay 0.3", "--weight-decay 1", "--weight-decay 3")  # beside the default, 0.1
RATE = ("--lr 6e-3",)  # beside the default, 3e-3
DENSE = (("--drop-path 0.1", "--drop-path 0.2", "--dropout 0.1", "--dropout 0.2"), DECAY, RATE)
MASKED = (("--workers 8", "--resample 100", "--drop-path 0.1", "--dropout 0.1"), DECAY, RATE)
DENSE_NEW = (("--dropout 0.1",), ("--weight-decay 0.3",), RATE)
MASKED_NEW = (("--resample 100",), ("--weight-decay 0.3",), RATE)
IMAGES = (("--weight-decay 2e-3", "--weight-decay 5e-3"),)  # beside the default, 5e-4

# Flags of arms, then of experiments.
SMALL = "--mask none --layers 3"
ONE_WORKER = f"{SMALL} --workers 1 --batch-size 2 --eval-batches"  # of 2 rows each: four times the others'
NEURONS, BLOCKS = "--mask forward --units neuron --resample 10", "--mask forward --resample 10"
ENDS = f"{BLOCKS} --keep ends --coverage 0.25"  # for the costs of C = 1/2 without kept blocks
GPT = "--layers 6 --width 64 --heads 4 --hidden 128 --batch-size 8 --workers 4 --save-every 0"
RESNET = "--model resnet18 --dtype bfloat16 --workers 8 --coverage 0.25 --eval-every 175 --save-every 0"


def arms_on_text(dense, masked, batches):
    """The arms of both larger trials on text. dense, masked: rounds of tuning; batches: of a validation."""
    return {
        "dense": Arm("--mask none", dense),
        "small dense": Arm(SMALL, dense),
        "4 small dense": Arm(f"{ONE_WORKER} {batches}", dense, members=4),
        "forward, neurons": Arm(NEURONS, masked),
        "forward, blocks": Arm(BLOCKS, masked),
    }


EXPERIMENTS = {
    "repeated": Experiment(
        partial(write_texts, source="lib2to3/fixes"),
        "--data text --data-dir datasets/repeated/{part}.txt",
        f"{GPT} --steps 3000 --eval-every 150 --eval-batches 20",
        arms_on_text(DENSE, MASKED, batches=80),
    ),
    "several": Experiment(  # 2.4 epochs of ten times as much text
        partial(write_texts, source="", size=1_060_000),
        "--data text --data-dir datasets/several/{part}.txt",
        f"{GPT} --steps 2000 --eval-every 200 --eval-batches 80",
        {
            "dense": Arm("--mask none", (RATE,)),
            "small dense": Arm(SMALL, (RATE,)),
            "forward, ends kept": Arm(f"{ENDS} --resample 100", (RATE,)),
        },
    ),
    "new": Experiment(  # a tenth of an epoch
        partial(write_texts, source=""),
        "--data text --data-dir datasets/new/{part}.txt",
        f"{GPT} --steps 1000 --eval-every 200 --eval-batches 100",
        arms_on_text(DENSE_NEW, MASKED_NEW, batches=400)
        | {
            "forward, ends kept": Arm(ENDS, MASKED_NEW),
            "forward, third or all": Arm(f"{NEURONS} --capacity 1,1,1,3", MASKED_NEW),
            "backward, blocks": Arm("--mask backward", MASKED_NEW),
            "1 layer": Arm("--mask none --layers 1", DENSE_NEW),
            "2 layers": Arm("--mask none --layers 2", DENSE_NEW),
            "4 layers": Arm("--mask none --layers 4", DENSE_NEW),
        },
    ),
    "images": Experiment(  # dense runs see 5 epochs, the others 20, for about the same FLOPs
        write_images,
        "--data cifar10 --data-dir datasets/images/{part}",
        RESNET,
        {
            "dense": Arm("--mask none --width 16 --epochs 5", IMAGES),
            "small dense": Arm("--mask none --width 8 --epochs 20", IMAGES),
            "forward, neurons": Arm("--mask forward --units neuron --width 16 --epochs 20", IMAGES),
            "forward, blocks": Arm("--mask forward --width 16 --epochs 20", IMAGES),
        },
        score="error",
    ),
}
FLAGS = [("--jobs", at_least(1), 1, "runs at a time, each with one thread")]


def name_of(arm, flags, seed):
    return "-".join(f"{arm} {flags} {seed}".replace("--", "").replace(",", "").split())


def read_result(path, flags):
    """What a run has left. Raises UserError where it was trained with other flags."""
    result = json.loads(path.read_text())
    if result["flags"] != flags:
        raise UserError(f"{path}: was trained with other flags than those of today; remove it")
    return result


def write_result(path, result):
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


def run_once(experiment, arm, flags, seed):
    """The result of an arm's run with more flags. It is trained unless its file is there."""
    definition, name = EXPERIMENTS[experiment], name_of(arm, flags, seed)
    data = definition.data.format(part="tune" if seed == TUNING_SEED else "report")
    all_flags = f"{definition.flags} {definition.arms[arm].flags} {flags} --seed {seed} {data}".split()
    path, out = Path("results", experiment, f"{name}.json"), Path("runs", experiment, name)
    if not path.exists():
        train(all_flags, out)
        about = {"arm": arm, "seed": seed, "tuning": seed == TUNING_SEED, "flags": all_flags}
        write_result(path, about | {"versions": versions()} | read_out(out))
    return read_result(path, all_flags)


def train(flags, out):
    """Run train.py with one thread. Raises UserError where it fails, unless because nothing stays finite."""
    command = [sys.executable, str(TRAIN), *flags, "--out", str(out), "--overwrite"]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if run.returncode and "nothing finite" not in run.stderr:
        raise UserError(f"train.py {' '.join(flags)}: has failed: {run.stderr[-500:]}")


def versions():
    git = ["git", "-C", str(TRAIN.parent), "rev-parse", "--short", "HEAD"]
    found = {"torch": torch.__version__, "python": platform.python_version(), "date": str(date.today())}
    return found | {"commit": subprocess.run(git, capture_output=True, text=True).stdout.strip()}


def scores(experiment, result):
    """What is to be low, at each validation of a run: nats per byte, or the share of wrong classes. It is
    infinite where it was not finite, and for a run that was given up."""
    if EXPERIMENTS[experiment].score == "error":
        return [1 - entry["val_accuracy"] for entry in result["curve"]] or [math.inf]
    losses = [entry["val_loss"] for entry in result["curve"]] or [None]
    return [math.inf if loss is None else loss for loss in losses]


def run_arm(experiment, arm):
    """Tune an arm. Returns (the best flags, the result of their tuning run, [those of each seed])."""
    flags, definition = "", EXPERIMENTS[experiment].arms[arm]
    for options in ((), *definition.rounds):
        results = {}
        for candidate in [flags, *(f"{flags} {option}".strip() for option in options)]:
            results[candidate] = run_once(experiment, arm, candidate, TUNING_SEED)
        flags = min(results, key=lambda candidate: min(scores(experiment, results[candidate])))
    run_seed = average_once if definition.members > 1 else run_once
    return flags, results[flags], [run_seed(experiment, arm, flags, seed) for seed in SEEDS]


def average_once(experiment, arm, flags, seed):
    """The result of an arm's members, whose predictions are averaged, as if they were one run."""
    members = EXPERIMENTS[experiment].arms[arm].members
    seeds = range(seed * members, (seed + 1) * members)
    first, *_ = [run_once(experiment, arm, flags, each) for each in seeds]
    path = Path("results", experiment, f"average-{name_of(arm, flags, seed)}.json")
    if not path.exists():
        loss = averaged_loss([Path("runs", experiment, name_of(arm, flags, each)) for each in seeds])
        curve = [first["curve"][-1] | {"val_loss": loss, "val_accuracy": None}]
        write_result(path, first | {"arm": f"{arm}, averaged", "seed": seed, "curve": curve})
    return read_result(path, first["flags"])


@torch.no_grad()
def averaged_loss(outs):
    """The validation loss, in nats per byte, of the mean of what the models of several runs predict."""
    flags = json.loads((outs[0] / "summary.json").read_text())["config"]
    tests = flags["eval_batches"] * flags["batch_size"]
    x, y = load(flags["data"], flags["data_dir"], flags["context"], tests).validation()
    log_probs = torch.stack([load_model(out / "ckpt.pt")(x).log_softmax(-1) for out in outs])
    mean = log_probs.logsumexp(0) - math.log(len(outs))  # (models, B, T, 256) -> (B, T, 256)
    return torch.nn.functional.nll_loss(mean.flatten(0, 1), y.flatten()).item()


def spread(numbers):
    """The mean, and the lowest and highest, as text."""
    return f"{np.mean(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"


def row(experiment, name):
    """The row of an arm in the table; of dashes where runs were given up. Costs are those before tuning, so
    that regularisers do not hide what masks save: FLOPs of the run, and otherwise of a step."""
    arm = EXPERIMENTS[experiment].arms[name]
    flags, best, results = run_arm(experiment, name)
    own, dense = (run_once(experiment, each, "", TUNING_SEED) for each in (name, "dense"))
    if not all(result["curve"] for result in (best, own, dense, *results)):
        return f"| {name} | - | - | - | - | - | - |"
    tuning, curves = scores(experiment, best), [scores(experiment, result) for result in results]
    costs = [own["costs"][key] / dense["costs"][key] for key in COST_KEYS[:2]]
    costs.append(own["curve"][-1]["flops"] / dense["curve"][-1]["flops"])
    at_best = spread([curve[int(np.argmin(tuning))] for curve in curves]) if arm.members == 1 else "-"
    all_flags = f"{arm.flags} {flags}".strip()
    cells = [name, f"`{all_flags}`", " / ".join(f"{cost:.2f}" for cost in costs)]
    cells += [f"{1 + sum(map(len, arm.rounds))}", f"{min(tuning):.3f}", at_best]
    return f"| {' | '.join([*cells, spread([curve[-1] for curve in curves])])} |"


def table(experiment):
    """Markdown, for results/log.md. Losses are in nats per byte, errors are shares of the images."""
    score = EXPERIMENTS[experiment].score
    tested_on = {"loss": "second text", "error": "test images"}[score]
    titles = "arm | flags | weights / activations / FLOPs of a worker | tuning runs"
    titles += f" | lowest {score} in tuning | {tested_on}: {score} at that step | {score} after the last step"
    rows = [row(experiment, arm) for arm in EXPERIMENTS[experiment].arms]
    return "\n".join([f"| {titles} |", "|---|---|---:|---:|---:|---:|---:|", *rows])


def main(argv=None):
    parser = make_parser(__doc__, FLAGS)
    parser.add_argument("name", choices=tuple(EXPERIMENTS), help="of the experiment")
    args = parser.parse_args(argv)
    with parser.answering(UserError, OSError):
        EXPERIMENTS[args.name].prepare(Path("datasets", args.name))
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(partial(run_arm, args.name), EXPERIMENTS[args.name].arms))
        print(table(args.name))


if __name__ == "__main__":
    main()
