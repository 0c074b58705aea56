"""Real processes for the tests of all folders. A test module gets the fixtures by this line:

pytest_plugins = ["support.testing", "support.processes"]
"""

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import uuid
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train

HERE = Path(__file__).parents[1]

TINY = "--layers 2 --width 32 --hidden 32 --context 32 --batch-size 8 --eval-batches 2".split()
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER += ("GROUP_RANK", "GROUP_WORLD_SIZE")
slow = pytest.mark.skipif("SLOW" not in os.environ, reason="another case of the same; runs with SLOW=1")
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
HANGS = 300  # seconds after which a test counts as hanging; nothing else is decided by time

# Processes are forked from a server that has imported torch and the programs, and has computed nothing
# yet: so a rank is there in a tenth of a second.
warm = multiprocessing.get_context("forkserver")
warm.set_forkserver_preload(["torch._dynamo", "train", "scripts.dense"])


@pytest.fixture(scope="session")
def in_processes(tmp_path_factory):
    """in_processes(n, function, *arguments): the function's results on ranks 0 to n - 1 of a gloo group.
    There is one group for each n, which stays until a call in it fails."""
    groups = {}

    def run(n, function, *arguments):
        if n not in groups:
            groups[n] = Group(n, tmp_path_factory.mktemp("group") / "store")
        try:
            return groups[n].call(function, arguments)
        except BaseException:
            groups.pop(n).kill()  # some ranks may wait for others
            raise

    yield run
    for group in groups.values():
        group.kill()


class Group:
    """n processes in a gloo group of their own, which call what they are given."""

    def __init__(self, n, meeting):
        pairs = [warm.Pipe() for _ in range(n)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            warm.Process(target=member, args=(rank, n, str(meeting), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def call(self, function, arguments):
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = {}
        while len(results) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = connection.wait(waiting, HANGS)
            assert ready, f"ranks other than {sorted(results)} hang"
            for pipe in ready:
                result, error = pipe.recv()
                if error is not None:
                    raise error
                results[self.pipes.index(pipe)] = result
        return [results[rank] for rank in range(len(self.pipes))]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()


def member(rank, n, meeting, pipe):
    """What a process of a group does."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=n, timeout=patience
    )
    while True:
        function, arguments = pipe.recv()
        result, failure = None, None
        try:
            result = function(*arguments)
        except BaseException as error:
            error.add_note(traceback.format_exc())  # where it was raised, in this process
            failure = error
        pipe.send((result, failure))


class Ranks:
    """A program of this project as torchrun would start it on so many processes, but from the warm server.
    `said` is the path of what they print; own: a list of arguments for each rank alone, or None; machine_of:
    the machine of each rank, as torchrun says it. It is used by `with`, which leaves no process behind."""

    def __init__(self, said, n, program, *arguments, own=None, machine_of=None):
        self.said = said
        self.store = dist.TCPStore("127.0.0.1", 0, n + 1, is_master=True, wait_for_workers=False)
        machine_of = machine_of or [0] * n
        environment = {"WORLD_SIZE": n, "GROUP_WORLD_SIZE": len(set(machine_of))}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port}
        environment |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        self.processes = []
        for rank in range(n):
            of_rank = environment | {"RANK": rank, "GROUP_RANK": machine_of[rank]}
            of_rank["LOCAL_RANK"] = machine_of[:rank].count(machine_of[rank])
            of_rank["LOCAL_WORLD_SIZE"] = machine_of.count(machine_of[rank])
            of_rank = {key: str(value) for key, value in of_rank.items()}
            flags = [str(flag) for flag in (*arguments, *(own[rank] if own else ()))]
            process = warm.Process(target=run_program, args=(program, flags, of_rank, str(said)))
            process.start()
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()

    def text(self):
        return self.said.read_text() if self.said.exists() else ""

    def finish(self):
        """Wait for all. Returns their exit codes."""
        for process in self.processes:
            process.join(HANGS)
        return [process.exitcode for process in self.processes]


def run_program(program, arguments, environment, said):
    """In a new process: `program` is train.py, or a module such as scripts.bench."""
    os.environ.pop("OMP_NUM_THREADS", None)  # of the process that has started the server
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(str(HERE / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


@pytest.fixture
def ranks(tmp_path):
    """ranks(n, program, *arguments): what a program prints on so many processes, which have to end well."""

    def run(n, program, *arguments):
        with Ranks(tmp_path / f"said-{uuid.uuid4().hex}", n, program, *arguments) as started:
            assert started.finish() == [0] * n, started.text()
            assert "Warning" not in started.text(), started.text()
            return started.text()

    return run


@pytest.fixture
def alone(monkeypatch):
    """For a program in this process: no torchrun around it, and one thread, which is enough for a small
    model."""
    threads = torch.get_num_threads()
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if dist.is_initialized():  # by a run that has failed
        dist.destroy_process_group()


@pytest.fixture
def refused(alone, capsys):
    """refused(*flags): the one line that train.py says on stderr, behind its bar, before it exits with 2."""

    def run(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.main([str(flag) for flag in flags])
        said = capsys.readouterr().err
        *bars, line = said.splitlines()
        assert stop.value.code == 2 and ": error: " in line and len(line) < 500, said
        assert all("step" in bar for bar in bars if bar.strip()), said
        return line

    return run


class Launched:
    """torchrun, or python alone where n is 0, in the background, with its workers: for what only torchrun
    does. It is used by `with`, which leaves no process behind."""

    def __init__(self, folder, n, *arguments, torchrun_flags=("--standalone",), program="train.py"):
        self.mark = uuid.uuid4().hex
        self.said = folder / f"said-{self.mark}"
        command = [sys.executable]
        if n:
            command += ["-m", "torch.distributed.run", "--nproc-per-node", str(n), *torchrun_flags]
        command += [program, *map(str, arguments)]
        left_out = (*LAUNCHER, "OMP_NUM_THREADS")
        environment = {key: value for key, value in os.environ.items() if key not in left_out}
        environment["MARK"] = self.mark
        with self.said.open("w") as said:
            options = {"cwd": HERE, "env": environment, "stdout": said, "stderr": said}
            self.process = subprocess.Popen(command, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for process in self.all_processes().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def all_processes(self):
        """{rank, or a name made up for what has none: process id} of what runs now of this launch."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                pairs = dict(pair.split("=", 1) for pair in entry.read_text().split("\0") if "=" in pair)
                if pairs.get("MARK") == self.mark:
                    number = int(entry.parent.name)
                    found[int(pairs["RANK"]) if "RANK" in pairs else f"process {number}"] = number
        return found

    def workers(self):
        """{rank: process id} of those that run now."""
        return {rank: process for rank, process in self.all_processes().items() if isinstance(rank, int)}

    def signal(self, rank, number):
        with contextlib.suppress(ProcessLookupError, KeyError):
            os.kill(self.workers()[rank], number)

    def wait_for(self, condition):
        end = time.time() + HANGS
        while not condition():
            assert time.time() < end and self.process.poll() is None, self.text()
            time.sleep(0.002)

    def text(self):
        return self.said.read_text()

    def finish(self):
        """The exit code, when all is over."""
        code = self.process.wait(HANGS)
        assert not self.workers(), "workers were left running"
        return code


# ---- what a run has left in its folder


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_log(out):
    """The steps of a run, without their times."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "step_ms"} for entry in entries]


def read_summary(out):
    return json.loads((out / "summary.json").read_text())


def assert_same_checkpoint(found, expected):
    """Bit for bit, by name, but for the flags. found, expected: paths."""
    found, expected = (torch.load(path, weights_only=True) for path in (found, expected))
    assert found["progress"] == expected["progress"] and found["config"] == expected["config"]
    assert found["model"].keys() == expected["model"].keys()
    assert found["optimizer"].keys() == expected["optimizer"].keys()
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor), name
    for name, state in expected["optimizer"].items():
        assert state and found["optimizer"][name].keys() == state.keys()
        assert all(torch.equal(found["optimizer"][name][key], state[key]) for key in state), name


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The Path of a small run of the GPT, with checkpoints of steps 2 and 3. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TINY, "--steps", 3, "--save-every", 2, "--out", folder / "run"]
    with Ranks(folder / "said", 1, "train.py", *flags) as started:
        assert started.finish() == [0], started.text()
    return folder / "run"
