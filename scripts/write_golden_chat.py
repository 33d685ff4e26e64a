"""Writes what transformers makes of chat messages by known models' templates. Needs transformers, no PyTorch.

Reads the conversations and the directories of templates in `tests/golden/chat`, which are kept by hand, and writes
a `golden.json` beside each template. They are described in `tests/golden/chat/README.md`; `make golden` runs this.
"""

# pyright: reportMissingImports=false

import argparse
import json
import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import jinja2
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers loads from the directory, with a vocabulary of no consequence."""
    with tempfile.TemporaryDirectory() as room:
        copy = Path(room) / directory.name
        shutil.copytree(directory, copy)
        Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(copy / "tokenizer.json"))
        return PreTrainedTokenizerFast.from_pretrained(copy)


def render(tokenizer: PreTrainedTokenizerBase, case: dict[str, Any]) -> str | dict[str, str]:
    """The prompt, or the message of the error that the template ends in."""
    try:
        return tokenizer.apply_chat_template(
            case["messages"],
            tools=case.get("tools"),
            add_generation_prompt=case.get("add_generation_prompt", True),
            tokenize=False,
            **case.get("options", {}),
        )
    except (jinja2.TemplateError, TypeError) as error:
        return {"error": str(error)}


def write_json(path: Path, record: dict[str, Any]) -> None:
    """JSON with a line for each rendering."""

    def lines(entries: dict[str, Any], indent: str) -> str:
        return ",\n".join(f"{indent}{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in entries.items())

    renderings = lines(record.pop("renderings"), "    ")
    text = "{\n" + lines(record, "  ") + ',\n  "renderings": {\n' + renderings + "\n  }\n}\n"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="directory of the conversations and templates, tests/golden/chat")
    out = parser.parse_args().out

    conversations = json.loads((out / "conversations.json").read_text(encoding="utf-8"))
    clock = mock.Mock(wraps=datetime)
    clock.now.return_value = datetime.fromisoformat(conversations["now"])
    for config in sorted(out.glob("*/tokenizer_config.json")):
        tokenizer = load_tokenizer(config.parent)
        with mock.patch.object(chat_template_utils, "datetime", clock):
            renderings = {case["name"]: render(tokenizer, case) for case in conversations["cases"]}
        record = {
            "transformers": transformers.__version__,
            "jinja2": jinja2.__version__,
            "special_tokens": tokenizer.special_tokens_map,
            "renderings": renderings,
        }
        write_json(config.parent / "golden.json", record)


if __name__ == "__main__":
    main()
