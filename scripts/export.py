"""Write the weights of a checkpoint for other programs.

python -m scripts.export runs/a/ckpt.pt weights.pt      # a state dict, as model.build(config) loads it
python -m scripts.export runs/a/ckpt.pt folder --hf     # of a GPT: for transformers' LlamaForCausalLM

With --coverage 0.5 a random half of the units, for model.build(config, {layer: (count, 0)}) or a Llama."""

import json
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from masks import UserError
from model import BatchNorm, GPTConfig, build
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
    if units and any(isinstance(module, BatchNorm) for module in model.modules()):
        why = "the batch norms of a cut ResNet need statistics from data"
        raise UserError(f"--coverage: {why}; export a whole one, or one trained with --norm group")
    if args.hf and not isinstance(model.config, GPTConfig):
        raise UserError("--hf: needs a GPT, but the checkpoint has another model")
    return cut(model, units, choose(units, args.coverage, args.seed)) if units else model


def describe_llama(model):
    """transformers' config.json, a dictionary. Raises UserError where a Llama cannot have this shape."""
    config, blocks = model.config, list(model.blocks.values())
    if len({(block.attention.q.shape, block.mlp.up.shape) for block in blocks}) > 1:
        raise UserError("--keep: all layers of a Llama have the same shape; use --keep none with --hf")
    head_width = blocks[0].attention.head_width
    heads, hidden = len(blocks[0].attention.q) // head_width, len(blocks[0].mlp.up)
    if config.width % heads:  # transformers 5 refuses it, also with a head_dim
        raise UserError(f"--coverage: leaves {heads} heads, which do not divide --width; try another")
    about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    about |= {"hidden_size": config.width, "intermediate_size": hidden, "head_dim": head_width}
    about |= {"num_hidden_layers": len(blocks), "num_attention_heads": heads}
    about |= {"vocab_size": config.vocabulary, "max_position_embeddings": config.context}
    about |= {"bos_token_id": None, "eos_token_id": None, "torch_dtype": "float32", "rms_norm_eps": 1e-5}
    return about


def llama_weights(model):
    """{name in transformers: tensor}. The scale of a branch with absent units goes into its weights."""
    state = {"model.embed_tokens.weight": model.embedding.weight}
    state |= {"model.norm.weight": model.head.norm.weight, "lm_head.weight": model.head.weight}
    for number, block in enumerate(model.blocks.values()):  # without gaps, where blocks are absent
        layer = f"model.layers.{number}"
        state[f"{layer}.input_layernorm.weight"] = block.norm1.weight
        state[f"{layer}.post_attention_layernorm.weight"] = block.norm2.weight
        for name, branch in (("self_attn", block.attention), ("mlp", block.mlp)):
            for key, weight in branch.named_parameters():
                weight = weight.T * branch.scale if key in ("o", "down") else weight
                state[f"{layer}.{name}.{key}_proj.weight"] = weight
    return {name: weight.detach().contiguous() for name, weight in state.items()}


def write_llama(model, path):
    """Write a folder, whole or not at all: with model.safetensors where safetensors is installed, else with
    pytorch_model.bin. Raises UserError, OSError, or torch's writer RuntimeError."""
    about, weights = describe_llama(model), llama_weights(model)
    of_gpt2 = 'those of GPT-2: transformers.AutoTokenizer.from_pretrained("gpt2")'
    tokens = "bytes, 0 to 255: bytes(tokens) is the text" if model.config.vocabulary == 256 else of_gpt2
    readme = f"A GPT for transformers' LlamaForCausalLM. Its tokens are {tokens}.\n"
    with tempfile.TemporaryDirectory(dir=path.parent) as part:
        folder = Path(part, "llama")
        folder.mkdir()
        if find_spec("safetensors"):
            content = import_module("safetensors.torch").save(weights, {"format": "pt"})
            (folder / "model.safetensors").write_bytes(content)
        else:
            save_file(weights, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
        (folder / "README.md").write_text(readme)
        folder.rename(path)


def main(argv=None):
    own = ("--units", "--keep")
    flags = [(flag, accepts, None, meaning) for flag, accepts, _, meaning in FLAGS if flag in own]
    flags.append(("--coverage", check_coverage, None, "write a random subnetwork, this share of units"))
    flags.append(("--seed", at_least(0), 0, "of the random subnetwork"))
    flags.append(("--hf", bool, False, "write a GPT as a folder for transformers' LlamaForCausalLM"))
    flags.append(("checkpoint", str, None, "a checkpoint of train.py"))
    flags.append(("file", Path, None, "file to write; with --hf, folder to make"))
    parser = make_parser(__doc__.splitlines()[0], flags)
    with parser.answering(UserError):
        args = parser.parse_args(argv)
        model = read(args)
        if args.file.exists():
            raise UserError(f"{args.file}: exists already; choose another name")
        try:
            if args.hf:
                write_llama(model, args.file)
            else:
                save_file(model.state_dict(), args.file)
        except (OSError, RuntimeError) as error:
            parser.error(f"{args.file}: cannot be written ({' '.join(str(error).split())})")
        params = sum(parameter.numel() for parameter in model.parameters())
        print(f"wrote {args.file}: {params:,} parameters, in blocks {', '.join(model.blocks)}")


if __name__ == "__main__":
    main()
