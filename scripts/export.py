"""Write the weights of a checkpoint as a plain state dict: python -m scripts.export runs/a/ckpt.pt weights.pt

model.build(config) loads it. With --coverage 0.5 it has a random half of the units, for
model.build(config, {layer: (count, 0)}).
"""

from pathlib import Path

import torch

from masks import UserError
from model import BatchNorm, build
from scripts.cut import check_coverage, choose, cut, units_to_cut
from support import checkpoint
from support.checkpoint import save_file
from support.launch import at_least, make_parser
from train import FLAGS


def load_model(path):
    """The whole model of a checkpoint, on the CPU and ready to be evaluated. Raises UserError."""
    return model_of(checkpoint.read_checkpoint(path))


def model_of(saved):
    """The same, of a checkpoint that has been read."""
    with torch.device("meta"):
        model = build(saved["config"])
    model.load_state_dict(saved["model"], assign=True)
    return model.eval().requires_grad_(False)


def read(args):
    """The model that the flags ask for: the whole one, or a part of it. Raises UserError."""
    saved = checkpoint.read_checkpoint(args.checkpoint)
    units, model = units_to_cut(args, saved), model_of(saved)
    if units:
        model = cut(model, units, choose(units, args.coverage, args.seed))
    if units and any(isinstance(module, BatchNorm) for module in model.modules()):
        why = "the batch norms of a cut ResNet need statistics from data"
        raise UserError(f"--coverage: {why}; export a whole one, or one trained with --norm group")
    return model


def main(argv=None):
    own = ("--units", "--keep")
    flags = [(flag, kind, None, meaning) for flag, kind, _, meaning in FLAGS if flag in own]
    flags.append(("--coverage", check_coverage, None, "write a random subnetwork, this share of units"))
    flags.append(("--seed", at_least(0), 0, "of the random subnetwork"))
    parser = make_parser(__doc__.splitlines()[0], flags)
    parser.add_argument("checkpoint", help="a checkpoint of train.py")
    parser.add_argument("file", type=Path, help="file to write")
    try:
        args = parser.parse_args(argv)
        model = read(args)
        if args.file.exists():
            raise UserError(f"{args.file}: exists already; choose another name")
        save_file(model.state_dict(), args.file)
        params = sum(parameter.numel() for parameter in model.parameters())
        print(f"wrote {args.file}: {params:,} parameters, in blocks {', '.join(model.blocks)}")
    except UserError as error:
        parser.error(str(error))
    except (OSError, RuntimeError) as error:
        parser.error(f"{args.file}: cannot be written ({' '.join(str(error).split())})")


if __name__ == "__main__":
    main()
