"""What --size and --keep name: shapes of models, and the blocks that all workers hold."""

from masks import UserError
from model import ResNet

SIZES = {"gpt": {}, "vit": {}, "resnet18": {}}  # what --size can be
SIZES["gpt"]["tiny"] = {"layers": 6, "width": 128, "heads": 4, "hidden": 256}
SIZES["gpt"]["10m"] = {"layers": 6, "width": 384, "heads": 6, "hidden": 1024}
SIZES["gpt"]["134m"] = {"layers": 12, "width": 768, "heads": 12, "hidden": 2048}
SIZES["gpt"]["500m"] = {"layers": 22, "width": 1280, "heads": 20, "hidden": 3328}
SIZES["gpt"]["1b"] = {"layers": 18, "width": 2048, "heads": 32, "hidden": 5376}
SIZES["vit"]["cifar"] = {"layers": 6, "width": 128, "heads": 4, "hidden": 256, "patch": 4}
# As ViT-Ti/16 and ViT-S/16:
SIZES["vit"]["tiny"] = {"layers": 12, "width": 192, "heads": 3, "hidden": 512, "patch": 16}
SIZES["vit"]["small"] = {"layers": 12, "width": 384, "heads": 6, "hidden": 1024, "patch": 16}


def preset(model, size, data_shape):
    """The shape, {field: value}, that --size names, or the first that fits. Raises UserError."""
    sizes = SIZES[model]
    if size and size not in sizes:
        raise UserError(f"--size {size}: --model {model} has {', '.join(sizes) or 'only --width'}")
    if not sizes:
        return {}
    first = "tiny" if model == "gpt" or data_shape["image"] > 64 else "cifar"
    return sizes[size or first]


def shared_blocks(keep, model):
    """The numbers of the blocks that every worker holds, a set. keep: none, ends (the first and the last),
    strided (first of each stage of a ResNet), or numbers such as "0,5". Raises UserError."""
    last = len(model.blocks) - 1
    named = {"none": set(), "ends": {0, last}}
    if isinstance(model, ResNet):
        named["strided"] = {0, 2, 4, 6}
    if keep in named:
        shared = named[keep]
    elif all(number.isdecimal() and int(number) <= last for number in keep.split(",")):
        shared = {int(number) for number in keep.split(",")}
    else:
        usable = f"{', '.join(named)}, or numbers from 0 to {last}, as 0,{last}"
        raise UserError(f"--keep {keep}: use {usable}")
    if len(shared) > last:
        raise UserError(f"--keep {keep}: keeps all {last + 1} blocks, and leaves nothing to mask")
    return shared
