"""What any distributed trainer needs around its loop: flags, process group, signals, and who is silent."""

import argparse
import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from masks import UserError
from support.peers import peers

HEARTBEAT = "step of rank {}"  # a key of the store


class Parser(argparse.ArgumentParser):
    """argparse, with bad input answered by one line on stderr and exit code 2."""

    def error(self, message):
        if int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) > 0:
            time.sleep(60)  # torchrun ends all when one leaves, and the first process is to speak before
        self.exit(2, f"{self.prog}: error: {message}\n")

    @contextmanager
    def answering(self, *kinds):
        """`with parser.answering(UserError):` these exceptions are bad input."""
        try:
            yield
        except kinds as error:
            self.error(str(error))


def at_least(least, number_type=int):
    """An argparse type: a finite number of that type that is not below `least`."""
    adjective = "whole" if number_type is int else "finite"

    def parse(text):
        with suppress(ValueError):
            number = number_type(text)
            if least <= number < float("inf"):  # not where it is nan
                return number
        raise argparse.ArgumentTypeError(f"{text!r}: must be a {adjective} number of at least {least}")

    return parse


def whole_numbers(text):
    """An argparse type: whole numbers above 0, such as 3,1,1,1."""
    return [at_least(1)(number) for number in text.split(",")]


def make_parser(description, flags, titles=None):
    """A Parser of flags (name, type or choices, default, meaning). titles: {a group's first flag: title}."""
    group = parser = Parser(description=description, allow_abbrev=False)
    special = {bool: {"action": "store_true"}, None: {"nargs": "?", "const": ""}}  # a value may be missing
    for flag, accepts, default, meaning in flags:
        usual = {"choices": accepts} if isinstance(accepts, tuple) else {"type": accepts}
        shown = "" if default in (None, False) else f" (default: {default})"
        if titles and flag in titles:
            group = parser.add_argument_group(titles[flag])
        group.add_argument(flag, default=default, help=meaning + shown, **special.get(accepts, usual))
    return parser


def world_size():
    """The number of processes that torchrun has started, on all machines; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank():
    """The number of this process, as torchrun says it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def count_machines():
    """The number of machines on which torchrun has started processes; 1 without torchrun."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def gather(value):
    """[the value of each process], by rank. All processes take part."""
    of_all = [None] * dist.get_world_size()
    with peers():
        dist.all_gather_object(of_all, value)
    return of_all


def machines_alike(needed):
    """The number of machines, where all have equally many processes, in the order of the ranks; else 1, and
    a line that says so, or a UserError where it is `needed`. All processes take part."""
    processes, machines = dist.get_world_size(), count_machines()
    machine_of = gather(int(os.environ.get("GROUP_RANK", "0")))
    if machine_of == [rank // (processes // machines) for rank in range(processes)]:
        return machines
    line = "machines have unequal numbers of processes, which exchange as if there were one machine"
    if needed:
        raise UserError(f"--assign machine: {line}; start equally many on each")
    if rank() == 0:
        print(line, flush=True)
    return 1


def start(device_name, timeout):
    """Join torchrun's process group, or make a group of one. Returns (this process's device, a store that
    all share). device_name: auto, cpu or cuda; timeout: of collectives, in seconds. Raises UserError."""
    local_processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device_name == "cuda" and not gpus:
        raise UserError("--device cuda: there is none on this machine; --device auto takes what there is")
    device, options = torch.device("cpu"), {"backend": "gloo", "timeout": timedelta(seconds=timeout)}
    if gpus and device_name != "cpu":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % gpus)
        torch.cuda.set_device(device)
        if local_processes <= gpus:  # NCCL refuses to share a GPU
            options |= {"backend": "nccl", "device_id": device}
    if not threads_were_chosen():
        usable_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, usable_cores // local_processes))
    if dist.is_initialized():  # in a notebook, by a run that was interrupted
        dist.destroy_process_group()
    store = dist.HashStore()
    try:
        if "RANK" in os.environ:
            store, *_ = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
            store = fresh_store(store, rank(), world_size())
        dist.init_process_group(store=store, rank=rank(), world_size=world_size(), **options)
    except (RuntimeError, ValueError) as error:  # torch has no narrower type for gloo, sockets and ports
        reason = str(error).splitlines()[0]
        port = "where the port is in use, set another MASTER_PORT, or torchrun's --master-port"
        gloo = "where gloo takes a wrong interface, set GLOO_SOCKET_IFNAME (one machine: lo, macOS: lo0)"
        raise UserError(f"the processes cannot reach each other ({reason}); {port}; {gloo}") from error
    store.set(HEARTBEAT.format(rank()), "0")
    return device, store


def default_dtype(device):
    """The name of bfloat16 on GPUs that have it, else of float32."""
    fine = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fine else "float32"


def threads_were_chosen():
    """Has the user set OMP_NUM_THREADS? Where torchrun itself sets it to 1, its own environment has none."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return "OMP_NUM_THREADS" in os.environ
    with suppress(OSError):
        return b"\0OMP_NUM_THREADS=" in b"\0" + Path(f"/proc/{os.getppid()}/environ").read_bytes()
    return False


def fresh_store(store, rank, processes):
    """A new part of the store: torchrun may start processes again, and leave in it the addresses of those
    that are gone. So each process writes a random word, which rank 0 answers by its own, until all have
    found an answer. The word of rank 0 names the new part."""
    word = os.urandom(16).hex()
    store.set(f"word of rank {rank}", word)
    if rank > 0:
        word = store.get(f"answer to {word}").decode()
        store.add(f"followers of {word}", 1)
    while rank == 0 and store.add(f"followers of {word}", 0) < processes - 1:
        for other in range(1, processes):
            store.set(f"answer to {store.get(f'word of rank {other}').decode()}", word)
        time.sleep(0.02)
    return dist.PrefixStore(word, store)


def compiled(function):
    """torch.compile(function). Raises UserError at the first call where that does not work here."""
    quick = torch.compile(function)

    def call(*inputs):
        try:
            return quick(*inputs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--compile: does not work here ({reason}); leave it out") from error

    return call


def shut_down(together=True):
    """End the process group. Destroying it holds Python's lock, which gloo's threads need for a moment
    after the last traffic: without the pause torch 2.6 sometimes hangs here."""
    if together:
        with peers():
            dist.barrier()
    time.sleep(0.1)
    dist.destroy_process_group()


def check_same_everywhere(facts):
    """Raises UserError where a fact, {name: value}, is not the same on all processes."""
    first, *others = gather(facts)
    for (name, value), (number, other) in product(first.items(), enumerate(others, start=1)):
        if other[name] != value:
            values = f"{value!r} on rank 0, but {other[name]!r} on rank {number}"
            raise UserError(f"{name.replace('_', '-')}: {values}; must be the same")


@contextmanager
def catch_signals(*numbers):
    """`with catch_signals(SIGTERM) as caught:` these signals go to a list, and do not end the program."""
    caught = []
    with ExitStack() as stack:
        for each in numbers:
            handler = signal.signal(each, lambda number, _: caught.append(number))
            stack.callback(signal.signal, each, handler)
        yield caught


def name_the_silent(store):
    """End this process, after a collective has failed, with a line that names who let the others wait. Who
    notices the failure adds a half to its step: so the lowest whole step is the culprit's."""
    heartbeats = [HEARTBEAT.format(each) for each in range(world_size())]
    try:
        store.set_timeout(timedelta(seconds=10))
        store.set(heartbeats[rank()], str(float(store.get(heartbeats[rank()])) + 0.5))
        time.sleep(2)  # until the others have noticed it too
        steps = [float(store.get(heartbeat)) for heartbeat in heartbeats]
    except RuntimeError:  # rank 0 has the store, where there is no torchrun
        sys.exit("train.py: error: rank 0 has not answered")
    if rank() != steps.index(max(steps)):  # another one speaks
        time.sleep(1)  # torchrun ends all when the first one leaves
        sys.exit(1)
    silent = [f"rank {each}" for each, step in enumerate(steps) if step == min(steps) and step % 1 == 0]
    who = ", ".join(silent) or "a process"
    why = "it has ended, was stopped, or needed longer than --timeout; --resume goes on from a checkpoint"
    sys.exit(f"train.py: error: {who} has not answered in step {min(steps):.0f}: {why}")
