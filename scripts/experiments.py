"""Run the arms of an experiment, and print its table: python -m scripts.experiments repeated --jobs 2

An arm is tuned first: in each of its rounds, flags are tried on top of the best so far, with one seed and one
text to validate. The best flags of all then run with three seeds, and are validated on a second text, which
no choice has used. Each run leaves a file in results/NAME, and a run whose file is there is skipped."""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import LEFT_OUT, load
from masks import UserError
from scripts.export import load_model
from support.launch import at_least, make_parser

TUNING_SEED, SEEDS = 100, (0, 1, 2)  # of the runs that choose flags, and of those that are reported
TRAIN = Path(__file__).parents[1] / "train.py"
CURVE_KEYS = ("step", "val_loss", "val_accuracy", "flops", "sent_bytes")  # of log.jsonl
COST_KEYS = ("weight_bytes", "activation_bytes", "flops")  # of a worker in summary.json


class Arm(NamedTuple):
    flags: str
    rounds: tuple  # of tuning: in each, one of several flags may be added
    members: int = 1  # models that are trained apart, and whose predictions are averaged


class Experiment(NamedTuple):
    source: str  # a folder of Python's standard library, whose .py files are learnt
    flags: str  # of all arms
    arms: dict  # {name: Arm}; the table has costs in parts of those of "dense"


DECAY = ("--weight-decay 0.3", "--weight-decay 1", "--weight-decay 3")  # beside the default, 0.1
RATE = ("--lr 6e-3",)  # beside the default, 3e-3
DENSE = (("--drop-path 0.1", "--drop-path 0.2", "--dropout 0.1", "--dropout 0.2"), DECAY, RATE)
MASKED = (("--workers 8", "--resample 100", "--drop-path 0.1", "--dropout 0.1"), DECAY, RATE)
ONE_WORKER = "--workers 1 --batch-size 2 --eval-batches 80"  # a model with the rows of one worker
GPT = "--layers 6 --width 64 --heads 4 --hidden 128 --batch-size 8 --workers 4 --save-every 0"
GPT += " --steps 3000 --eval-every 150 --eval-batches 20"
ARMS = {
    "dense": Arm("--mask none", DENSE),
    "small dense": Arm("--mask none --layers 3", DENSE),
    "4 small dense": Arm(f"--mask none --layers 3 {ONE_WORKER}", DENSE, members=4),
    "forward, neurons": Arm("--mask forward --units neuron --resample 10", MASKED),
    "forward, blocks": Arm("--mask forward --resample 10", MASKED),
}
EXPERIMENTS = {
    "repeated": Experiment("lib2to3/fixes", GPT, ARMS),
    "new": Experiment("", GPT, ARMS),  # the whole standard library: a third of an epoch
}
FLAGS = (
    ("--jobs", at_least(1), 1, "runs at a time, each with one thread"),
    ("--table", bool, False, "only print the table of what is there"),
)


def write_texts(folder, source):
    """Write tune.txt and report.txt, for --data text: the same nine parts of bytes to train on, then another
    part each, which is held out. Raises UserError where the standard library has no such files."""
    root = Path(sysconfig.get_paths()["stdlib"], source)
    paths = [path for path in root.rglob("*.py") if not LEFT_OUT & {*path.relative_to(root).parts}]
    if not paths:
        raise UserError(f"{root}: is not in this version of Python; use 3.11 or 3.12")
    paths.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())
    text = b"\n".join(path.read_bytes() for path in paths)
    part = len(text) // 11
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tune.txt").write_bytes(text[: 10 * part])
    (folder / "report.txt").write_bytes(text[: 9 * part] + text[10 * part : 11 * part])


def file_name(*words):
    return "-".join(" ".join(words).replace("--", "").replace(",", "").split())


def find(experiment, arm, flags, seed, train_missing):
    """The result of a run, a dictionary. One that is not there is trained; or it is None. Raises UserError
    where it has other flags than now."""
    run = file_name(arm, flags, str(seed))
    path, out = Path("results", experiment, f"{run}.json"), Path("runs", experiment, run)
    _, common, arms = EXPERIMENTS[experiment]
    part = "tune" if seed == TUNING_SEED else "report"
    all_flags = f"{common} {arms[arm].flags} {flags} --seed {seed}".split()
    all_flags += f"--data text --data-dir datasets/{experiment}/{part}.txt".split()
    if train_missing and not path.exists():
        train(all_flags, out)
        result = {"arm": arm, "seed": seed, "tuning": seed == TUNING_SEED, "flags": all_flags}
        write(path, result | {"versions": versions()} | read_out(out))
    return read_result(path, all_flags)


def read_result(path, flags):
    """What `write` has written, or None. Raises UserError where it is of other flags."""
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    if result["flags"] != flags:
        raise UserError(f"{path}: was trained with other flags than those of today; remove it")
    return result


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def train(flags, out):
    """Run train.py with one thread. Raises UserError where it fails."""
    command = [sys.executable, str(TRAIN), *flags, "--out", str(out), "--overwrite"]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"train.py {' '.join(flags)}: has failed: {run.stderr[-500:]}")


def versions():
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=TRAIN.parent
    )
    found = {"commit": commit.stdout.strip(), "date": time.strftime("%Y-%m-%d")}
    return found | {"torch": torch.__version__, "python": platform.python_version()}


def read_out(out):
    """The curve of a run, and what a worker costs, the mean over the workers: bytes, and FLOPs of a step.
    memory_bytes leave out gradients and optimizer, as one process has those of all its workers."""
    summary = json.loads((out / "summary.json").read_text())
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    curve = [{key: entry[key] for key in CURVE_KEYS} for entry in log if "val_loss" in entry]
    costs = {key: float(np.mean([row[key] for row in summary["per_worker"]])) for key in COST_KEYS}
    return {"curve": curve, "costs": costs, "memory_bytes": costs["weight_bytes"] + costs["activation_bytes"]}


def lowest(result):
    """(where the curve of a run is lowest, how low): an index, and nats per byte."""
    losses = [entry["val_loss"] or math.inf for entry in result["curve"]]
    return int(np.argmin(losses)), min(losses)


def tune(experiment, arm, train_missing):
    """(the best flags, their result, how many were tried); where a run is not there, its result is None."""
    flags, tried = "", 1
    best = find(experiment, arm, flags, TUNING_SEED, train_missing)
    for options in EXPERIMENTS[experiment].arms[arm].rounds:
        candidates = [f"{flags} {option}".strip() for option in options]
        results = [find(experiment, arm, candidate, TUNING_SEED, train_missing) for candidate in candidates]
        if None in (best, *results):
            return flags, None, tried
        tried += len(results)
        for candidate, result in zip(candidates, results):
            if lowest(result)[1] < lowest(best)[1]:
                flags, best = candidate, result
    return flags, best, tried


def run_arm(experiment, arm):
    """Tune an arm, and run what is best with each seed."""
    flags, _, _ = tune(experiment, arm, train_missing=True)
    members = EXPERIMENTS[experiment].arms[arm].members
    for seed in SEEDS:
        member_seeds = range(seed * members, (seed + 1) * members)
        results = [find(experiment, arm, flags, each, train_missing=True) for each in member_seeds]
        path = path_of_average(experiment, arm, flags, seed)
        if members > 1 and not path.exists():
            outs = [Path("runs", experiment, file_name(arm, flags, str(each))) for each in member_seeds]
            curve = [results[0]["curve"][-1] | {"val_loss": averaged_loss(outs), "val_accuracy": None}]
            write(path, results[0] | {"arm": f"{arm}, averaged", "seed": seed, "curve": curve})


def path_of_average(experiment, arm, flags, seed):
    return Path("results", experiment, f"{file_name('average', arm, flags, str(seed))}.json")


@torch.no_grad()
def averaged_loss(outs):
    """The validation loss, in nats per byte, of the mean of what the models of several runs predict."""
    flags = json.loads((outs[0] / "summary.json").read_text())["config"]
    tests = flags["eval_batches"] * flags["batch_size"]
    x, y = load(flags["data"], flags["data_dir"], flags["context"], tests).validation()
    log_probs = torch.stack([load_model(out / "ckpt.pt")(x).log_softmax(-1) for out in outs])
    mean = log_probs.logsumexp(0) - math.log(len(outs))  # (models, B, T, 256) -> (B, T, 256)
    return torch.nn.functional.nll_loss(mean.flatten(0, 1), y.flatten()).item()


def reported(experiment, arm, flags):
    """The results of an arm with its best flags, one a seed, or None where it is not there."""
    members = EXPERIMENTS[experiment].arms[arm].members
    results = []
    for seed in SEEDS:
        result = find(experiment, arm, flags, seed * members, train_missing=False)
        if members > 1 and result:
            result = read_result(path_of_average(experiment, arm, flags, seed), result["flags"])
        results.append(result)
    return results


def spread(numbers):
    """The mean, and the lowest and highest, as text."""
    return f"{np.mean(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"


def row(experiment, name):
    """The row of an arm in the table; of dashes as long as runs are missing. Costs are those before tuning,
    so that regularisers do not hide what masks save."""
    arm = EXPERIMENTS[experiment].arms[name]
    flags, best, tuning_runs = tune(experiment, name, train_missing=False)
    results = reported(experiment, name, flags)
    own, dense = (find(experiment, each, "", TUNING_SEED, train_missing=False) for each in (name, "dense"))
    if None in (best, own, dense, *results):
        return f"| {name} | - | - | - | - | - | - |"
    best_index, best_loss = lowest(best)
    curves = [[entry["val_loss"] for entry in result["curve"]] for result in results]
    costs = " / ".join(f"{own['costs'][key] / dense['costs'][key]:.2f}" for key in COST_KEYS)
    at_best = spread([curve[best_index] for curve in curves]) if arm.members == 1 else "-"
    cells = [name, f"`{arm.flags} {flags}`", costs, f"{tuning_runs}", f"{best_loss:.3f}", at_best]
    return f"| {' | '.join([*cells, spread([curve[-1] for curve in curves])])} |"


def table(experiment):
    """Markdown, for results/README.md. Losses are in nats per byte."""
    titles = "arm | flags | weights / activations / FLOPs of a worker | tuning runs | lowest loss in tuning"
    titles += " | second text: loss at that step | loss after the last step"
    rows = [row(experiment, arm) for arm in EXPERIMENTS[experiment].arms]
    return "\n".join([f"| {titles} |", "|---|---|---:|---:|---:|---:|---:|", *rows])


def main(argv=None):
    parser = make_parser(__doc__, FLAGS)
    parser.add_argument("name", choices=tuple(EXPERIMENTS), help="of the experiment")
    args = parser.parse_args(argv)
    try:
        if not args.table:
            write_texts(Path("datasets", args.name), EXPERIMENTS[args.name].source)
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda arm: run_arm(args.name, arm), EXPERIMENTS[args.name].arms))
    except (UserError, OSError) as error:
        parser.error(str(error))
    print(table(args.name))


if __name__ == "__main__":
    main()
