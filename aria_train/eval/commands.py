"""The commands that look at a trained model. Only argparse is imported until one runs."""

from __future__ import annotations

from typing import Any

from aria_train.arguments import command, local_path


def register(subparsers: Any) -> None:
    """Adds `generate` and `eval` to the command line's `add_subparsers` object."""
    _register_generate(subparsers)
    parser = subparsers.add_parser(
        "eval",
        help="evaluate a checkpoint: loss, needles, experts, answers",
        description="Evaluates a checkpoint, alone or under torchrun. The last line printed is the result as JSON; it "
        "goes to the run directory's report/ too, with a picture where there is something to see.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _register_loss(commands)
    _register_needle(commands)
    _register_experts(commands)
    _register_answers(commands)


def _register_generate(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="Continues a prompt of text and images, as it comes. An image stands where the prompt says "
        "<|img|>; without any, the images come before the text.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or run directory")
    parser.add_argument("--tokenizer", metavar="FOLDER", help=_TOKENIZER)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="size class (default: by each image's size)")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn: the model answers it")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="most to generate (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest tokens only")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (%(default)s)")
    parser.set_defaults(run=command("aria_train.eval.terminal", "run_generate"))


def _register_loss(commands: Any) -> None:
    parser = commands.add_parser("loss", help="mean cross-entropy of held-out tokens, by source")
    _add_evaluation(parser)
    _add_data(parser)
    parser.set_defaults(run=command("aria_train.eval.reports", "run_loss"))


def _register_needle(commands: Any) -> None:
    parser = commands.add_parser(
        "needle",
        help="find one fact in long text, or one image among many",
        description="Hides a needle in haystacks of growing length, at every depth, and asks for it: a fact in text "
        "or, with --questions, an image that a question is about among images of another corpus.",
    )
    _add_evaluation(parser)
    parser.add_argument("--haystack", metavar="CORPUS", help="corpus to hide in (default: one of data.validation)")
    parser.add_argument("--questions", metavar="CORPUS", help="prepared conversations, each about an image")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens (default: up to the context)")
    parser.add_argument("--depths", type=int, default=11, metavar="N", help="places of the needle (%(default)s)")
    parser.add_argument("--trials", type=int, default=1, metavar="N", help="needles per length and depth (%(default)s)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help=_TOKENIZER)
    parser.set_defaults(run=command("aria_train.eval.reports", "run_needle"))


def _register_experts(commands: Any) -> None:
    parser = commands.add_parser(
        "experts",
        help="which experts see and which read",
        description="Shows, for every layer and routed expert, how much more often visual tokens choose it than text "
        "tokens do, for each source of held-out data.",
    )
    _add_evaluation(parser)
    _add_data(parser)
    parser.set_defaults(run=command("aria_train.eval.reports", "run_experts"))


def _register_answers(commands: Any) -> None:
    parser = commands.add_parser("answers", help="accuracy on questions with known answers")
    _add_evaluation(parser)
    parser.add_argument(
        "questions", metavar="QUESTIONS", help="prepared corpus of conversations, or JSON lines of them"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="ask the first so many only")
    parser.add_argument("--tokenizer", metavar="FOLDER", help=_TOKENIZER)
    parser.set_defaults(run=command("aria_train.eval.reports", "run_answers"))


_TOKENIZER = "tokenizer (default: the one the checkpoint's run named)"


def _add_evaluation(parser: Any) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or run directory")
    parser.add_argument(
        "--output", type=local_path, metavar="FOLDER", help="where results go (default: report/ of the run directory)"
    )


def _add_data(parser: Any) -> None:
    parser.add_argument(
        "--data",
        action="append",
        metavar="[NAME=]PATH",
        help="held-out corpus; may be repeated (default: data.validation of the checkpoint's run)",
    )
    parser.add_argument("--windows", type=int, metavar="N", help="windows of each (default: train.eval_windows)")
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens per window (default: as trained)")
