"""Go on with a text, by a GPT: python -m scripts.sample runs/a/ckpt.pt --prompt "import os" --seed 1"""

import torch

from masks import UserError
from model import GPTConfig
from scripts.export import load_model
from support.launch import Parser, at_least


def codec(vocabulary):
    """(encode, decode) between text and tokens: bytes, or GPT-2's. Raises UserError."""
    if vocabulary == 256:
        return str.encode, lambda tokens: bytes(tokens).decode(errors="replace")
    try:
        import tiktoken
    except ImportError:
        raise UserError("GPT-2's tokens need tiktoken: pip install tiktoken") from None
    gpt2 = tiktoken.get_encoding("gpt2")
    return gpt2.encode_ordinary, lambda tokens: gpt2.decode([t for t in tokens if t < gpt2.n_vocab])


def main(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", help="ckpt.pt in the --out of train.py")
    parser.add_argument("--prompt", default="", help="the text to go on with (default: a new line)")
    parser.add_argument("--tokens", type=at_least(1), default=200, help="how many to add (200)")
    parser.add_argument("--temperature", type=at_least(0, float), default=0.8, help="0: the likeliest")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the choice (default: 0)")
    args = parser.parse_args(argv)
    try:
        model = load_model(args.checkpoint)
        if not isinstance(model.config, GPTConfig):
            raise UserError(f"{args.checkpoint}: is no GPT; only a GPT goes on with a text")
        encode, decode = codec(model.config.vocabulary)
    except UserError as error:
        parser.error(str(error))
    torch.manual_seed(args.seed)
    tokens = list(encode(args.prompt or "\n"))
    for _ in range(args.tokens):
        logits = model(torch.tensor([tokens[-model.config.context :]]))[0, -1].double()  # (vocabulary,)
        chances = torch.softmax(logits / max(args.temperature, 1e-9), dim=0)  # at 0: 1 for the likeliest
        tokens.append(torch.multinomial(chances, 1).item())
    print(decode(tokens))


if __name__ == "__main__":
    main()
