"""Print how many steps take a masked worker the FLOPs that --steps take a dense one.

python -m scripts.flops --mask forward --finish 0.3 --steps 1000     # with the flags of train.py"""

import masks
import train
from sdp import SDP
from support import costs, launch


def main(argv=None):
    parser = train.make_parser()
    parser.description = __doc__.splitlines()[0]
    args, saved = train.parse(argv, parser)
    with parser.answering(masks.UserError):
        plan = train.make_plan(args, saved, masks.assign)
        device, _ = launch.start(args.device, args.timeout)
    args.compile = False  # which changes no FLOPs
    args.dtype = args.dtype or launch.default_dtype(device)
    mask = plan.draw_mask(0)
    engine = train.make_engine(plan, mask, args.mask, device, SDP)
    dense = costs.dense_worker(args, plan.whole.config, engine)["flops"]
    flops = costs.Phase(plan, engine, args.mask).flops  # of a step, the mean over the workers
    if args.finish:
        engine.change(mask, "backward")
        flops = (1 - args.finish) * flops + args.finish * costs.Phase(plan, engine, "backward").flops
    launch.shut_down()
    print(round(args.steps * dense / flops))


if __name__ == "__main__":
    main()
