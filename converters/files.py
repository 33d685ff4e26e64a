"""What lies in a model's directory besides its weights and is carried along with them."""

from pathlib import Path

COPIED_FILES = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    "calibration.safetensors",  # names its model by its weights, which stay the same
)
"""Their names, or patterns of them, relative to the directory."""


def copied_files(directory: Path) -> list[Path]:
    """Those that a directory has."""
    return [file for pattern in COPIED_FILES for file in sorted(directory.glob(pattern))]
