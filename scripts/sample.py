"""Continue a text with a trained GPT: python -m scripts.sample --out runs/a --prompt "import os" --seed 1"""

import codecs

from masks import UserError
from model import GPTConfig
from scripts.export import load_model
from support.evaluation import continue_text
from support.launch import Parser, at_least


def tokenizer(vocabulary):
    """(encode: text to tokens, decode: a token to bytes), of bytes or of GPT-2. Raises UserError."""
    if vocabulary == 256:
        return lambda text: text.encode(errors="surrogateescape"), lambda token: bytes([token])
    try:
        import tiktoken

        gpt2 = tiktoken.get_encoding("gpt2")  # downloads a file, the first time
    except ImportError:
        raise UserError("GPT-2's tokens need tiktoken: pip install tiktoken") from None
    except OSError as error:
        raise UserError(f"tiktoken cannot download GPT-2's tokens, as it does once ({error})") from None
    return gpt2.encode_ordinary, lambda t: gpt2.decode_single_token_bytes(t) if t < gpt2.n_vocab else b""


def main(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?", help="a checkpoint of train.py, instead of --out")
    parser.add_argument("--out", help="folder of the run: its ckpt.pt is read")
    parser.add_argument("--prompt", default="", help="text to continue (default: a new line)")
    parser.add_argument("--tokens", type=at_least(1), default=200, help="tokens to add (default: 200)")
    parser.add_argument("--temperature", type=at_least(0, float), default=0.8, help="0 = greedy (0.8)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the random choices (default: 0)")
    args = parser.parse_args(argv)
    with parser.answering(UserError):
        if bool(args.checkpoint) == bool(args.out):
            raise UserError("--out: give the folder of a run or a checkpoint, and not both")
        model = load_model(args.checkpoint or args.out)
        if not isinstance(model.config, GPTConfig):
            raise UserError(f"{args.checkpoint or args.out}: is not a GPT; only a GPT can continue a text")
        encode, decode = tokenizer(model.config.vocabulary)
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a character can be of several tokens
    print(args.prompt, end="", flush=True)
    for token in continue_text(model, encode(args.prompt or "\n"), args.tokens, args.temperature, args.seed):
        print(text.decode(decode(token)), end="", flush=True)
    print(text.decode(b"", final=True))


if __name__ == "__main__":
    main()
