"""Flags, joining and leaving, and faults: with real processes, which are stopped and killed.

SLOW=1 in the environment kills at twenty random moments instead of one.
"""

import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist

import model
import train
from masks import UserError
from support import checkpoint, launch
from support.journal import Journal
from support.processes import (
    HANGS,
    HERE,
    TINY,
    Launched,
    Ranks,
    assert_same_checkpoint,
    lines,
    needs_proc,
    read_log,
    read_summary,
)

pytest_plugins = ["support.testing", "support.processes"]

TRIALS = range(20 if "SLOW" in os.environ else 1)
SLOW_TO_WRITE = "--width 512 --save-every 1 --eval-every 0".split()
RUN = [*TINY, "--mask", "forward", "--steps", "80", "--save-every", "10", "--eval-every", "40"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


# ---- flags

BAD = [  # flags, what the one line must say
    ("--coverage 0", ("--coverage 0", "at most 1")),
    ("--coverage 1.5", ("--coverage 1.5", "at most 1")),
    ("--coverage nan", ("--coverage nan", "at most 1")),
    ("--coverage 2 --mask none", ("--coverage 2", "at most 1")),
    ("--coverage half", ("--coverage", "half")),
    ("--coverage 0.1", ("--coverage 0.1", "0.125")),
    ("--coverage 0.3 --layers 2", ("--coverage", "0.375")),
    ("--coverage 0.1 --workers 8 --units neuron", ("--coverage", "blocks.0.attention", "0.1875")),
    ("--cov 0.5", ("--cov",)),
    ("--assign core", ("--assign", "core", "machine")),
    ("--assign machine", ("--assign machine", "--machines 2")),
    ("--assign machine --machines 3", ("--machines 3", "must divide the 4 workers")),
    ("--machines 0", ("--machines", "at least 1")),
    ("--capacity 1,2,x,1", ("--capacity", "'x'", "whole number")),
    ("--capacity 1,2,1", ("--capacity [1, 2, 1]", "needs 4 numbers")),
    ("--capacity 9,1,1,1", ("--capacity", "1/2 of the sum")),
    ("--capacity 99,99,1,99", ("--capacity", "smallest worker would have no unit")),
    ("--capacity 1,1,1,1 --assign machine --machines 2", ("--capacity", "--assign machine")),
    ("--rows 1,1,1,1,1", ("--rows [1, 1, 1, 1, 1]", "needs 4 numbers")),
    ("--rows 3,1,1,1 --batch-size 16", ("--batch-size 16", "a multiple of 6", "such as 18")),
    ("--rows 0,1,1,1", ("--rows", "at least 1")),
    ("--batch-size 10", ("--batch-size 10", "4 workers", "such as 12")),
    ("--batch-size 3", ("--batch-size 3", "such as 4")),
    ("--batch-size 0", ("--batch-size", "at least 1")),
    ("--micro-batches 3", ("--batch-size 16", "3 --micro-batches", "such as 24")),
    ("--workers 0", ("--workers", "at least 1")),
    ("--workers two", ("--workers", "whole number")),
    ("--mask sideways", ("--mask", "sideways", "forward")),
    ("--units brick", ("--units", "brick", "neuron")),
    ("--keep strided", ("--keep strided", "none, ends, or numbers from 0 to 5")),
    ("--keep 6", ("--keep 6", "0 to 5")),
    ("--keep 0,1,2,3,4,5", ("--keep", "nothing to mask")),
    ("--resample -1", ("--resample", "at least 0")),
    ("--resample 5 --mask none", ("--resample 5", "--mask none")),
    ("--resample 5 --compile", ("--resample 5", "--compile")),
    ("--finish 0.3", ("--finish 0.3", "--mask forward")),
    ("--finish 1.5 --mask forward", ("--finish 1.5", "at most 1")),
    ("--model resnet", ("--model", "gpt")),
    ("--size huge", ("--size huge", "gpt has tiny, 10m, 134m, 500m, 1b")),
    ("--model vit --size 10m --data-dir SMALL", ("--size 10m", "vit has cifar, tiny, small")),
    ("--model resnet18 --size tiny --data-dir SMALL", ("--size tiny", "resnet18 has", "--width")),
    ("--layers 1.5", ("--layers", "whole number")),
    ("--width 30", ("--width 30", "multiple of 8", "--heads")),
    ("--model resnet18 --width 12 --data-dir SMALL", ("--width 12", "multiple of 8")),
    ("--heads 3", ("--width 128", "multiple of 6")),
    ("--model resnet18 --heads 4 --data-dir SMALL", ("--heads 4", "not for --model resnet18")),
    ("--hidden 40", ("--hidden 40", "multiple of 16")),
    ("--model vit --patch 5 --data-dir SMALL", ("--patch 5", "divide the 32")),
    ("--norm batch", ("--norm batch", "not for --model gpt")),
    ("--norm layer", ("--norm", "group")),
    ("--context 10000000", ("--context 10000000", "below")),
    ("--model vit --context 64 --data-dir SMALL", ("--context 64", "not for --model vit")),
    ("--drop-path 1", ("--drop-path 1", "below 1")),
    ("--dropout 1", ("--dropout 1", "below 1")),
    ("--data novels", ("--data", "python")),
    ("--model vit --data python", ("--data python", "--model vit")),
    ("--data cifar10 --data-dir SMALL", ("--data cifar10", "--model gpt")),
    ("--data-dir /nowhere", ("--data-dir /nowhere", "no such file or folder")),
    ("--data-dir SMALL", ("--data-dir", "a folder with dozens of .py files")),
    ("--data text", ("--data-dir datasets/text", "no such file or folder; name one")),
    ("--data cifar10 --data-dir /nowhere", ("/nowhere", "python -m scripts.prepare cifar10")),
    ("--data fineweb --data-dir /nowhere", ("/nowhere", "python -m scripts.prepare fineweb")),
    ("--model resnet18 --data imagenet --data-dir /nowhere", ("/nowhere", "scripts.prepare imagenet")),
    ("--steps -1", ("--steps", "at least 0")),
    ("--steps 3 --epochs 1", ("--epochs 1", "--steps")),
    ("--epochs 0", ("--epochs", "at least 0.001")),
    ("--optimizer adam", ("--optimizer", "adamw")),
    ("--lr nan", ("--lr", "at least 0")),
    ("--lr -1", ("--lr", "at least 0")),
    ("--warmup x", ("--warmup", "whole number")),
    ("--weight-decay -0.1", ("--weight-decay", "at least 0")),
    ("--grad-clip -1", ("--grad-clip", "at least 0")),
    ("--eval-every often", ("--eval-every", "whole number")),
    ("--eval-batches 0", ("--eval-batches", "at least 1")),
    ("--dtype int8", ("--dtype", "bfloat16")),
    ("--device tpu", ("--device", "cuda")),
    ("--seed -1", ("--seed", "at least 0")),
    ("--out /dev/null/x", ("--out /dev/null/x", "cannot be written")),
    ("--wandb", ("--wandb", "expected one argument")),
    ("--overwrite=yes", ("--overwrite", "yes")),
    ("--resume", ("--resume", "--out")),
    ("--resume /nowhere", ("--resume", "/nowhere", "no such file")),
    ("--save-every -1", ("--save-every", "at least 0")),
    ("--timeout 0", ("--timeout", "at least 1")),
    ("anything", ("anything",)),
]
if not torch.cuda.is_available():
    BAD.append(("--device cuda", ("--device cuda", "none on this machine")))


@pytest.mark.parametrize("flags, says", BAD, ids=[flags for flags, _ in BAD])
def test_bad_flags_end_with_one_line(refused, small_cifar, flags, says):
    line = refused(*flags.replace("SMALL", str(small_cifar)).split())
    assert all(words in line for words in says), line


def test_every_flag_is_tried():
    """Each flag that takes a value has a row among the bad ones."""
    actions = [action for action in train.make_parser()._actions if action.nargs != 0]
    flags = {flag for action in actions for flag in action.option_strings}
    assert flags <= set(" ".join(flags for flags, _ in BAD).split())


def test_workers_are_a_multiple_of_the_processes(refused, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused("--workers", 3)
    assert "--workers 3" in line and "2 processes" in line


@needs_proc
def test_bad_flags_under_torchrun(tmp_path):
    """One of the two processes speaks, and nothing is left running."""
    with Launched(tmp_path, 2, "--workers", 3) as run:
        assert run.finish() == 1  # torchrun's own code
        ours = run.text().split("torch/distributed/elastic")[0].splitlines()  # what comes before its report
    (line,) = [line for line in ours if "error: " in line]
    assert "--workers 3" in line and not any('.py", line' in line for line in ours), ours


# ---- an error of the program keeps its traceback

MISTAKES = [
    (train, "load_batches", RuntimeError("gloo: a mistake in whoever made the batches")),
    (Journal, "end", RuntimeError("[gloo] connection closed by peer: a mistake in the loop")),
    (checkpoint, "open_log", OSError("a mistake where a file is opened")),
    (model, "run_blocks", ValueError("a mistake in the model")),
    (train, "evaluate", KeyError("a mistake in the validation")),
]


@pytest.mark.parametrize("place, name, mistake", MISTAKES, ids=[name for _, name, _ in MISTAKES])
def test_mistakes_in_the_code_end_with_their_own_error(alone, monkeypatch, tmp_path, place, name, mistake):
    def fail(*_, **__):
        raise mistake

    monkeypatch.setattr(place, name, fail)
    with pytest.raises(type(mistake)) as caught:
        train.main([*TINY, "--steps", "2", "--out", str(tmp_path)])
    assert caught.value is mistake


# ---- threads

THREADS = [  # what torchrun was started with, what its processes have, how many start; was it chosen?
    ({}, {}, 2, False),
    ({}, {"OMP_NUM_THREADS": "1"}, 2, False),  # torchrun's own default
    ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1"}, 2, True),
    ({"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "3"}, 2, True),
    ({}, {"OMP_NUM_THREADS": "1"}, 1, True),  # for a single process torchrun sets nothing
]


@needs_proc
@pytest.mark.parametrize("of_torchrun, own, processes, chosen", THREADS)
def test_threads_are_chosen_by_the_user_alone(monkeypatch, of_torchrun, own, processes, chosen):
    """A process that only waits stands for torchrun."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in {**own, "LOCAL_WORLD_SIZE": str(processes)}.items():
        monkeypatch.setenv(name, value)
    wait = ["/bin/sh", "-c", "echo; read line"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(wait, env={"PATH": "/bin"} | of_torchrun, **pipes) as parent:
        parent.stdout.readline()  # until it runs, /proc may show an empty environment
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        assert launch.threads_were_chosen() == chosen


@pytest.mark.parametrize("chosen, threads", [(False, 3), (True, 5)])
def test_processes_share_the_cores(alone, monkeypatch, chosen, threads):
    now = [5]
    monkeypatch.setattr(torch, "set_num_threads", lambda number: now.append(number))
    monkeypatch.setattr(launch, "threads_were_chosen", lambda: chosen)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    launch.start("cpu", 10)
    assert now[-1] == threads


# ---- joining


@pytest.mark.parametrize("trouble", ["the port is taken", "there is no such interface"])
def test_the_network_is_named(refused, monkeypatch, trouble):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port, interface, says = str(taken.getsockname()[1]), "lo", "MASTER_PORT"
        if trouble == "there is no such interface":
            port, interface, says = free_port(), "no0", "GLOO_SOCKET_IFNAME"
        settings = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in (settings | {"GLOO_SOCKET_IFNAME": interface}).items():
            monkeypatch.setenv(name, value)
        line = refused(*TINY, "--device", "cpu")
    assert says in line and "set" in line


@pytest.mark.parametrize("late", [None, 0, 2])
def test_restarts_do_not_find_the_past(late):
    """Three processes that meet at a store in which those of an earlier start have left their words."""
    store = dist.HashStore()

    def arrive(rank, start):
        time.sleep(0.1 if start and rank == late else 0)
        part = launch.fresh_store(store, rank, 3)
        part.set(f"start of {rank}", str(start))
        return [int(part.get(f"start of {each}")) for each in range(3)]

    for start in range(3):
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(arrive, range(3), [start] * 3)) == [[start] * 3] * 3


def what_differs(name):
    facts = {"--lr": 0.1, "torch's version": "2.13.0", "the data's checksum": 1, "--out": None}
    if dist.get_rank() == 1:
        facts[name] = 7
    with pytest.raises(UserError) as error:
        launch.check_same_everywhere(facts)
    return str(error.value)


@pytest.mark.parametrize("name", ["--lr", "torch's version", "the data's checksum"])
def test_machines_that_differ(in_processes, name):
    for said in in_processes(2, what_differs, name):
        assert name in said and "7 on rank 1" in said


def test_flags_that_differ_between_processes(tmp_path):
    """Rank 0 names the flag. Rank 1 waits to be ended, as torchrun does then."""
    own = [["--lr", "0.1"], ["--lr", "0.2"]]
    with Ranks(tmp_path / "said", 2, "train.py", *TINY, own=own) as run:
        run.processes[0].join(HANGS)
        assert run.processes[0].exitcode == 2 and run.processes[1].is_alive()
        (line,) = run.text().splitlines()
    assert "--lr: 0.1 on rank 0, but 0.2 on rank 1" in line


@needs_proc
def test_two_machines(tmp_path):
    """Two torchrun agents that meet over a c10d rendezvous; here both are on this host."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "sdp"]
    flags = [*TINY, "--steps", 2, "--out", tmp_path / "run"]
    options = {"torchrun_flags": ["--nnodes", "2", *meeting]}
    with Launched(tmp_path, 1, *flags, **options) as one, Launched(tmp_path, 1, *flags, **options) as two:
        said = [(run.finish(), run.text()) for run in (one, two)]
    assert [code for code, _ in said] == [0, 0], said
    assert sum("mean / none" in text for _, text in said) == 1  # rank 0 speaks, on one of them
    summary = read_summary(tmp_path / "run")
    assert (summary["workers"], summary["processes"]) == (2, 2)


# ---- faults


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run on two processes to which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Ranks(folder / "said", 2, "train.py", *RUN, "--out", folder / "run") as run:
        assert run.finish() == [0, 0], run.text()
    return folder / "run"


def wait_until(run, condition):
    """While all of its processes run."""
    end = time.time() + HANGS
    while not condition():
        assert time.time() < end and all(process.is_alive() for process in run.processes), run.text()
        time.sleep(0.002)


def assert_named(run, silent):
    """The other of two ranks ends, with one line that names the one that does not answer."""
    run.processes[1 - silent].join(HANGS)
    assert run.processes[1 - silent].exitcode == 1
    assert run.text().count(f"rank {silent} has not answered in step") == 1, run.text()
    assert "Traceback" not in run.text()


def test_a_worker_stalls(tmp_path):
    """In a step, and in another run while it writes a checkpoint. Both runs wait at the same time."""
    endless = [*TINY, "--steps", 100000, "--timeout", 1, "--out"]
    in_step, in_save = tmp_path / "step", tmp_path / "save"
    with (
        Ranks(tmp_path / "said 1", 2, "train.py", *endless, in_step) as first,
        Ranks(tmp_path / "said 2", 2, "train.py", *endless, in_save, *SLOW_TO_WRITE) as second,
    ):
        wait_until(second, (in_save / "ckpt.pt.part").exists)
        os.kill(second.processes[0].pid, signal.SIGSTOP)
        wait_until(first, lambda: lines(in_step / "log.jsonl") >= 3)
        os.kill(first.processes[1].pid, signal.SIGSTOP)
        assert_named(first, silent=1)
        assert_named(second, silent=0)


def assert_stopped(out, text, at_least):
    """All stopped after the same step, and left a checkpoint of it."""
    last = read_log(out)[-1]["step"]
    assert f"stopped by a signal after step {last}; --resume continues" in text
    assert checkpoint.read_checkpoint(out / "ckpt.pt")["progress"]["step"] == last
    assert at_least <= last < 80 and not (out / "summary.json").exists()


def assert_resumes(out, undisturbed):
    """The rest of a run leads to what the undisturbed run has."""
    with Ranks(out.parent / "said", 2, "train.py", *RUN, "--out", out, "--resume") as run:
        assert run.finish() == [0, 0], run.text()
    assert_same_checkpoint(out / "ckpt.pt", undisturbed / "ckpt.pt")
    assert read_log(out) == read_log(undisturbed)
    assert read_summary(out)["final_val_loss"] == read_summary(undisturbed)["final_val_loss"]


def test_a_worker_is_interrupted(tmp_path, undisturbed):
    out = tmp_path / "run"
    with Ranks(tmp_path / "said", 2, "train.py", *RUN, "--out", out) as run:
        wait_until(run, lambda: lines(out / "log.jsonl") >= 25)
        os.kill(run.processes[1].pid, signal.SIGINT)
        assert run.finish() == [0, 0], run.text()
    assert_stopped(out, run.text(), at_least=25)
    assert_resumes(out, undisturbed)


PROGRAM = f"""
import sys

sys.path.insert(0, {str(HERE)!r})
import train

train.main()
sys.stdout.write(f"threads were chosen: {{train.launch.threads_were_chosen()}}\\n")  # in one piece
"""


@needs_proc
@pytest.mark.parametrize("trial", TRIALS)
def test_a_worker_is_killed_and_later_torchrun_is_terminated(tmp_path, undisturbed, trial):
    """The first at a random moment, before the first step or after: torchrun starts all again. Then a signal
    to torchrun itself, which passes it on. Its number of threads is not the user's choice."""
    rng, out = np.random.default_rng([trial, 1]), tmp_path / "run"
    step, rank = int(rng.integers(-10, 40)), int(rng.integers(2))
    (tmp_path / "program.py").write_text(PROGRAM)
    restart = {"program": tmp_path / "program.py", "torchrun_flags": ["--standalone", "--max-restarts", "3"]}
    with Launched(tmp_path, 2, *RUN, "--out", out, **restart) as run:
        run.wait_for(lambda: len(run.workers()) == 2)
        first = run.workers()[rank]
        soon = time.time() + rng.uniform(0, 4)
        run.wait_for(lambda: lines(out / "log.jsonl") >= max(1, step) or (step < 0 and time.time() > soon))
        time.sleep(rng.uniform(0, 0.02))
        os.kill(first, signal.SIGKILL)
        run.wait_for(lambda: run.workers().get(rank, first) != first)
        run.wait_for(lambda: lines(out / "log.jsonl") >= 45)
        run.process.terminate()
        assert run.finish() == 1, run.text()  # torchrun's own code
    assert_stopped(out, run.text(), at_least=45)
    assert run.text().count("threads were chosen: False") == 2, run.text()
    assert_resumes(out, undisturbed)


@pytest.mark.parametrize("trial", TRIALS)
def test_all_are_killed_while_a_checkpoint_is_written(tmp_path, trial):
    """What is there can be read, and is of the last steps."""
    rng, out = np.random.default_rng([trial, 2]), tmp_path / "run"
    flags = [*TINY, *SLOW_TO_WRITE, "--steps", 100000, "--workers", 1, "--out", out]
    wanted = int(rng.integers(1, 6))
    with Ranks(tmp_path / "said", 1, "train.py", *flags) as run:
        wait_until(run, lambda: lines(out / "log.jsonl") > wanted and (out / "ckpt.pt.part").exists())
        time.sleep(rng.uniform(0, 0.06))
    left = [out / name for name in ("ckpt.pt", "ckpt.prev.pt") if (out / name).exists()]
    steps = [checkpoint.read_checkpoint(path)["progress"]["step"] for path in left]
    logged = lines(out / "log.jsonl")
    assert logged - 2 <= steps[0] <= logged and steps == list(range(steps[0], steps[0] - len(steps), -1))
    assert checkpoint.read_to_resume("", str(out))["path"] == left[0]
