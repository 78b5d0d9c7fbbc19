"""Serves a backbone with its heads under OpenAI's API: one GPU, one request after the other.

    python serve.py out/heads
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

It decodes as generate.py does, with the same trees, and takes chat and text completions, streamed or not. What it
cannot do (sampling other than by temperature, several answers, tools, log-probabilities) is refused and named. It has
no passwords and no encryption: put a proxy in front of it before you give --host anything but this machine.
"""

import argparse
import logging

from common import errors, terminal
from common.errors import BadInput
from conversations.options import add_options, parse_kwargs
from conversations.prompts import question, tokenise
from conversations.template import ChatTemplate
from conversations.tokenizer import load_tokenizer
from decoding.choosing import add_tree_options, check_tree_options, choose_tree
from decoding.loading import load_model
from model.backbone import context_length, end_tokens
from model.bits import add_bits_option
from model.heads_file import find_heads, tokenizer_of

logger = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    """Raises BadInput for impossible numbers, before anything loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("heads", help="the --output_dir of a training run, or one of its checkpoints")
    add("--host", default="127.0.0.1", help="the address to listen at (default: this machine alone)")
    add("--port", type=int, default=8000)
    add("--name", help="the model's name in the API (default: the directory's)")
    add("--max_length", type=int, help="tokens of prompt and answer (default: 8192, or the backbone's context)")
    add("--temperature", type=float, default=0.0, help="where a request names none; 0 is greedy")
    add("--max_waiting", type=int, default=256, help="requests that may wait; more get status 429")
    add_tree_options(parser)
    add("--dtype", choices=("bfloat16", "float32"), help="of the weights (default: bfloat16 on a GPU, else float32)")
    add("--base_model", help="the backbone, if it has moved since the heads were trained")
    add_bits_option(parser)
    add_options(parser)
    args = parser.parse_args()
    check_tree_options(args)
    if args.temperature < 0 or args.max_waiting < 0 or (args.max_length or 1) < 1 or not 0 <= args.port < 2**16:
        raise BadInput("--temperature and --max_waiting must be 0 or more, --max_length 1 or more, --port below 65536")
    return args


def build(args):
    """-> the application. Raises BadInput if heads, backbone, template and tree do not fit."""
    try:
        from serving.app import Api
        from serving.writer import Writer
    except ImportError as error:
        raise BadInput(f"serving needs {error.name}: pip install -r requirements-serve.txt") from error
    directory, stage2 = find_heads(args.heads)
    kwargs = parse_kwargs(args.chat_template_kwargs)
    chat = ChatTemplate(
        load_tokenizer(tokenizer_of(directory, stage2, args.base_model), args.chat_template), kwargs=kwargs
    )
    model = load_model(args.heads, args.base_model, args.dtype, args.backbone_dtype)
    context = context_length(model.backbone)
    if (args.max_length or 0) > context:
        raise BadInput(f"--max_length {args.max_length}: the backbone knows {context} positions")
    max_length = args.max_length or min(context, 8192)
    (prompt,) = tokenise([question("Why is the sky blue?")], chat)
    tree = choose_tree(args, model, prompt[: max_length - 1], max_length, 1)
    writer = Writer(model, tree, max_length, end_tokens(model.backbone), args.max_waiting, args.agree)
    name = args.name or directory.resolve().name
    return Api(writer, chat, name, args.temperature).app()


def main():
    terminal.start()
    args = parse_arguments()
    app = build(args)
    import uvicorn  # not at the top: `build` says how to get it

    uvicorn.run(app, host=args.host, port=args.port, log_level="info")


if __name__ == "__main__":
    errors.run(main)
