"""`xquant convert HF_DIR OUT_DIR`: a Hugging Face checkpoint, with the SVD factors that XQuant needs."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("convert", help="convert a Hugging Face checkpoint and precompute its SVD factors")
    parser.add_argument("source", metavar="HF_DIR", help="with config.json and safetensors, or a name on the Hub")
    parser.add_argument("target", metavar="OUT_DIR", type=Path, help="directory to write; must not exist or be empty")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from converters.conversion import convert  # writes with orbax: imported when it is called for

    convert(arguments.source, arguments.target)
