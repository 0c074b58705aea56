"""Count what machines send to each other on the wire, by the flags of train.py: python -m results.wire"""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from statistics import mean, median

import torch

import train
from data import load_batches
from masks import UserError, assign
from scripts.dense import Dense
from sdp import SDP
from support import launch
from support.peers import add_up

ARMS = "ddp,fsdp,none-flat,none,backward-flat,backward,backward-machine,forward-flat,forward,forward-machine"
FLAGS = (  # name, type or choices, default, meaning; some take the place of a flag of train.py
    ("--machines", launch.at_least(2), 2, "network namespaces of this one; needs Linux and root"),
    ("--processes", launch.at_least(1), 2, "of a machine; each is one worker"),
    ("--mbit", launch.at_least(0), 0, "megabits per second, to and from a machine; 0 = unlimited"),
    ("--arms", str, ARMS, "beside ddp; MODE-flat: exchange in one level; MODE-machine: masks by machine"),
    ("--steps", launch.at_least(1), 8, "measured steps of each arm"),
    ("--out", str, None, "file for the numbers, in JSON"),
)
DEVICE, MTU = "wire", 65000  # a machine's interface; its packets are so large that headers hardly count
WARM_UP = 2  # steps of each arm, before the measured ones


def shell(commands):
    """Run commands, which Ctrl-C does not reach. Raises UserError where one fails."""
    run = subprocess.run(["/bin/sh", "-ec", commands], capture_output=True, text=True, start_new_session=True)
    if run.returncode:
        raise UserError(f"machines need Linux, root, ip and tc ({' '.join(run.stderr.split())})")


def start_machine(number, hub, args):
    """Make the namespace, with a cable to the hub, and run torchrun in it. It is a namespace of processes,
    too: so torchrun's workers end with it, though each leads a session of its own."""
    name, address = f"{hub}-{number}", f"10.77.0.{number + 1}"
    speed = f"tbf rate {args.mbit}mbit burst 70kb latency 500ms" if args.mbit else "noqueue"
    shell(f"""
        ip netns add {name}
        ip -n {hub} link add {name} mtu {MTU} master hub up type veth peer name {DEVICE} netns {name}
        ip -n {name} link set {DEVICE} mtu {MTU} up
        ip -n {name} link set lo up
        ip -n {name} address add {address}/24 dev {DEVICE}
        tc -n {hub} qdisc replace dev {name} root {speed}
        tc -n {name} qdisc replace dev {DEVICE} root {speed}""")
    command = f"ip netns exec {name} env GLOO_SOCKET_IFNAME={DEVICE} TORCH_CPP_LOG_LEVEL=ERROR".split()
    command += "LOGLEVEL=CRITICAL unshare --pid --kill-child --mount-proc".split() + [sys.executable]
    command += f"-m torch.distributed.run --nnodes {args.machines} --nproc-per-node {args.processes}".split()
    command += f"--node-rank {number} --master-addr 10.77.0.1 --local-addr {address} -m results.wire".split()
    command += [*sys.argv[1:], "--arms", ",".join(args.arms)]
    return subprocess.Popen(command, env={"OMP_NUM_THREADS": "1", **os.environ}, start_new_session=True)


def run_machines(args):
    """Start all machines, and remove them at the end. Ends the program where one of them fails."""
    hub, launches = f"sdp{os.getpid()}", []
    with launch.catch_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as caught:
        try:
            shell(f"ip netns add {hub}; ip -n {hub} link add hub up type bridge")
            for number in range(args.machines):
                launches.append(start_machine(number, hub, args))
            codes = [None]
            while None in codes and not (any(codes) or caught):
                time.sleep(0.1)
                codes = [each.poll() for each in launches]
        finally:
            for each in launches:
                each.kill()
            for name in (hub, *(f"{hub}-{number}" for number in range(args.machines))):
                shell(f"ip netns del {name} || true")
    if any(codes) or caught:
        sys.exit("wire.py: error: a machine has failed, or a signal has come")


def measure(engines, plan):
    """{arm: [(bytes that this machine sends in a step, milliseconds)]}; "waiting" has only barriers."""
    found, interface, sent = {}, Path(f"/sys/class/net/{DEVICE}/statistics/tx_bytes"), 0
    for step in range(1, WARM_UP + plan.args.steps + 1):
        for arm, engine in (engines | {"waiting": None}).items():
            batches = engine and load_batches(plan.data, engine, plan.args, step)
            torch.distributed.barrier()  # nobody goes on until all have read what was sent
            began, sent_before = time.perf_counter(), sent
            if engine:
                train.update(engine, batches, plan.args, step, plan.args.lr)
            torch.distributed.barrier()
            ms, sent = 1e3 * (time.perf_counter() - began), int(interface.read_text())
            found.setdefault(arm, []).append((sent - sent_before, ms))
    return {arm: rows[WARM_UP:] for arm, rows in found.items()}


def play(args, plan, by_worker, by_machine):
    """What runs in the machines. by_worker, by_machine: masks. Rank 0 prints the table."""
    launch.start("cpu", args.timeout)
    engines, table = {}, {}
    for arm in args.arms:
        mode, _, way = arm.partition("-")
        mask = by_machine if way == "machine" else by_worker
        engine_class = Dense if mode in ("ddp", "fsdp") else SDP
        machines = 1 if engine_class is Dense or way == "flat" else args.machines
        engines[arm] = train.make_engine(plan, mask, mode, "cpu", engine_class, machines)
    found = measure(engines, plan)
    waiting = mean(nbytes for nbytes, _ in found.pop("waiting"))
    for arm, rows in found.items():
        sent = mean(nbytes for nbytes, _ in rows) - waiting if os.environ["LOCAL_RANK"] == "0" else 0
        counted = engines[arm].traffic["between_machines"] / (WARM_UP + args.steps)
        sent, counted = (total / args.machines / 1e6 for total in add_up([sent, counted]))
        row = {"sent_mb": sent, "counted_mb": counted or None, "step_ms": median(ms for _, ms in rows)}
        table[arm] = row | {f"{k}_vs_ddp": row[k] / table.get("ddp", row)[k] for k in ("sent_mb", "step_ms")}
    if torch.distributed.get_rank() == 0:
        print(f"{'':<18}" + "".join(f"{key:>16}" for key in table["ddp"]))
        for arm, row in table.items():
            print(f"{arm:<18}" + "".join(f"{'-' if n is None else f'{n:.3f}':>16}" for n in row.values()))
        if args.out:
            about = {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "flags": vars(args)}
            Path(args.out).write_text(json.dumps(about | {"arms": table}, indent=1) + "\n")
    launch.shut_down()


def main():
    parser = launch.make_parser(__doc__, {flag[0]: flag for flag in (*train.FLAGS, *FLAGS)}.values())
    args, _ = train.parse(None, parser)
    args.arms = ["ddp", *(arm for arm in args.arms.split(",") if arm != "ddp")]
    with parser.answering(UserError):
        for flag in ("mask", "assign", "workers", "resume", "resample", "finish", "epochs", "device"):
            if getattr(args, flag) != parser.get_default(flag):
                raise UserError(f"--{flag} {getattr(args, flag)}: is not for results.wire; leave it out")
        if set(args.arms) - set(ARMS.split(",")):
            raise UserError(f"--arms {','.join(args.arms)}: must be of {ARMS}")
        args.workers, args.dtype = args.machines * args.processes, args.dtype or "float32"
        plan = train.make_plan(args, None, assign)
        other = train.make_plan(Namespace(**vars(args) | {"assign": "machine"}), None, assign)
        if "RANK" in os.environ:
            return play(args, plan, plan.draw_mask(0), other.draw_mask(0))
        if "fsdp" in args.arms and not hasattr(torch.cpu.Stream, "record_event"):
            args.arms.remove("fsdp")
            print(f"fsdp is left out: it needs a newer torch on a CPU than {torch.__version__}")
        run_machines(args)


if __name__ == "__main__":
    main()
