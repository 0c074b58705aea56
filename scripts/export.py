"""Write the weights of a checkpoint for other programs.

python -m scripts.export runs/a/ckpt.pt weights.pt      # a state dict, as model.build(config) loads it
python -m scripts.export runs/a/ckpt.pt folder --hf     # of a GPT: for transformers' LlamaForCausalLM
"""

import json
import tempfile
from pathlib import Path

import torch

from masks import UserError
from model import GPTConfig, build
from support import checkpoint
from support.checkpoint import save_file
from support.launch import Parser


def load_model(path):
    """The whole model of a checkpoint, on the CPU and ready to be evaluated. Raises UserError."""
    saved = checkpoint.read_checkpoint(path)
    with torch.device("meta"):
        model = build(saved["config"])
    model.load_state_dict(saved["model"], assign=True)
    return model.eval().requires_grad_(False)


def write_llama(model, path):
    """Write a folder, whole or not at all. Raises OSError, or RuntimeError from torch's writer."""
    about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    about |= {"hidden_size": model.config.width, "intermediate_size": model.config.hidden}
    about |= {"num_hidden_layers": model.config.layers, "num_attention_heads": model.config.heads}
    about |= {"vocab_size": model.config.vocabulary, "max_position_embeddings": model.config.context}
    about |= {"bos_token_id": None, "eos_token_id": None, "torch_dtype": "float32", "rms_norm_eps": 1e-5}
    state = {"model.embed_tokens.weight": model.embedding.weight}
    state |= {"model.norm.weight": model.head.norm.weight, "lm_head.weight": model.head.weight}
    for number, block in model.blocks.items():
        layer = f"model.layers.{number}"
        state[f"{layer}.input_layernorm.weight"] = block.norm1.weight
        state[f"{layer}.post_attention_layernorm.weight"] = block.norm2.weight
        for name, module in (("self_attn", block.attention), ("mlp", block.mlp)):
            for key, weight in module.named_parameters():
                state[f"{layer}.{name}.{key}_proj.weight"] = weight.T if key in ("o", "down") else weight
    with tempfile.TemporaryDirectory(dir=path.parent) as part:
        folder = Path(part, "llama")
        folder.mkdir()
        save_file({n: w.detach().contiguous() for n, w in state.items()}, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
        folder.rename(path)


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", type=load_model, metavar="checkpoint", help="ckpt.pt of train.py")
    parser.add_argument("file", type=Path, help="to be written; with --hf, the folder to be made")
    parser.add_argument("--hf", action="store_true", help="of a GPT: for transformers' LlamaForCausalLM")
    try:
        args = parser.parse_args(argv)
        if args.hf and not isinstance(args.model.config, GPTConfig):
            raise UserError("--hf: is for a GPT, and the checkpoint is of another model")
        if args.file.exists():
            raise UserError(f"{args.file}: is there already; choose another name")
        if args.hf:
            write_llama(args.model, args.file)
        else:
            save_file(args.model.state_dict(), args.file)
    except UserError as error:
        parser.error(str(error))
    except (OSError, RuntimeError) as error:
        parser.error(f"{args.file}: cannot be written ({' '.join(str(error).split())})")


if __name__ == "__main__":
    main()
