"""Validate a whole model, by default as in training: python or torchrun -m scripts.evaluate ckpt.pt"""

import torch

from masks import UserError
from scripts.export import load_model
from support import checkpoint, evaluation, launch
from train import FLAGS, load, make_config


def main(argv=None):
    own = ("--data-dir", "--eval-batches", "--batch-size")  # all others are the checkpoint's
    flags = [(flag, kind, None, meaning) for flag, kind, _, meaning in FLAGS if flag in own]
    parser = launch.make_parser(__doc__, flags)
    parser.add_argument("checkpoint", help="ckpt.pt in the --out of train.py")
    try:
        saved = checkpoint.read_checkpoint(parser.parse_args(argv).checkpoint)
        parser.set_defaults(**saved["flags"], **saved["progress"])
        args = parser.parse_args(argv)
        data = load(args.data, args.data_dir, args.context, args.eval_batches * args.batch_size)
        make_config(args, data, saved)  # raises where the data does not fit
        model = load_model(args.checkpoint)
        device, _ = launch.start("auto", args.timeout)
    except UserError as error:
        parser.error(str(error))
    for parameter in model.parameters():
        parameter.data = parameter.to(getattr(torch, args.dtype))  # as in training
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.to(torch.promote_types(norm.weight.dtype, torch.float32))
    loss, accuracy = evaluation.evaluate(model.to(device), data.to(device), args.batch_size, device)
    if torch.distributed.get_rank() == 0:
        print(f"step {args.step}: val_loss {loss:.4f} nats per {data.item}, accuracy {accuracy:.4f}")
    launch.shut_down()


if __name__ == "__main__":
    main()
