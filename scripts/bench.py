"""Time SDP beside DDP and FSDP, by the flags of train.py: torchrun --nproc-per-node 4 -m scripts.bench"""

import json
import time
from pathlib import Path
from statistics import median, quantiles

import torch

import train
from data import load_batches
from masks import UserError, assign
from scripts.dense import Dense
from sdp import SDP
from support import checkpoint, costs, launch

ENGINES = {"ddp": Dense, "fsdp": Dense, "sdp-none": SDP, "sdp-backward": SDP, "sdp-forward": SDP}
UNITS = dict(step_ms=1, vs_ddp=1, static_bytes=1e6, activation_bytes=1e6, sent_bytes=1e6, flops=1e9)


def bench(plan, device):
    """{name: {key: number}}. Bytes and FLOPs are those of the worker that takes most."""
    args, engines, found, machines = plan.args, {}, {}, launch.machines_alike(needed=False)
    for name, engine_class in ENGINES.items():
        allocated, mode = torch.cuda.memory_allocated(), name.removeprefix("sdp-")
        mask = plan.draw_mask(0)
        engine = train.make_engine(plan, mask, mode, device, engine_class, machines)
        engines[name] = engine
        of_workers = costs.dry_run(args, plan.whole.config, engine)
        for step in (1, 2, 3):  # to warm up
            train.update(engine, load_batches(plan.data, engine, args, step), args, step, args.lr)
        memory = Dense.memory if engine_class is Dense else costs.memory
        rows = costs.gather_costs(engine, of_workers, 3, args.micro_batches, memory)
        most = {key: max(row[key] or 0 for row in rows) for key in rows[0]}
        found[name] = {key: most[key] for key in ("activation_bytes", "flops")}
        found[name]["static_bytes"] = most["weight_bytes"] + most["grad_bytes"] + most["optimizer_bytes"]
        found[name]["peak_bytes"] = most["peak_bytes"] - allocated if device.type == "cuda" else None
        found[name]["sent_bytes"] = most["push_bytes"] + most["pull_bytes"]
    seconds = {name: [] for name in engines}  # of each step
    for step in range(1, args.steps + 1):
        for name, engine in engines.items():  # they take turns, so that drift hits all alike
            batches = load_batches(plan.data, engine, args, step)
            torch.distributed.barrier()  # over NCCL it waits for the GPU, too
            began = time.perf_counter()
            train.update(engine, batches, args, step, args.lr)
            torch.distributed.barrier()
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        found[name] |= {"step_ms": 1e3 * median(times), "vs_ddp": median(times) / median(seconds["ddp"])}
        found[name]["step_ms_spread"] = [1e3 * q for q in quantiles(times)[::2]] if len(times) > 1 else None
        found[name][f"{plan.data.items}_per_s"] = args.batch_size * plan.data.items_per_row / median(times)
    return found


def main(argv=None):
    parser = train.make_parser()
    parser.description = __doc__
    parser.set_defaults(steps=20, workers=launch.world_size())
    args, _ = train.parse(argv, parser)
    try:
        for flag in ("mask", "workers", "resume", "resample", "finish", "epochs"):
            if getattr(args, flag) != parser.get_default(flag):
                raise UserError(f"--{flag} {getattr(args, flag)}: does not work in scripts.bench; remove it")
        plan = train.make_plan(args, None, assign)
        if args.out:
            checkpoint.prepare_folder(args, None, names=["bench.json"])
        device, _ = launch.start(args.device, args.timeout)
        if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise UserError(f"--device cpu: FSDP on a CPU needs a newer torch than {torch.__version__}")
        if device.type == "cuda" and torch.distributed.get_backend() == "gloo":
            raise UserError("--device cuda: needs a GPU per process; start fewer, or use --device cpu")
        args.dtype = args.dtype or launch.default_dtype(device)
        plan.data = plan.data.to(device)
        found = bench(plan, device)
        if torch.distributed.get_rank() == 0:
            print(f"{'':<14}    step, ms     vs. DDP  static, MB  activ., MB    sent, MB       GFLOP")
            for name, row in found.items():
                print(f"{name:<14}" + "".join(f"{row[key] / unit:>12.2f}" for key, unit in UNITS.items()))
            if args.out:
                Path(args.out, "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    except UserError as error:
        parser.error(str(error))
    finally:
        if torch.distributed.is_initialized():
            launch.shut_down(together=False)


if __name__ == "__main__":
    main()
