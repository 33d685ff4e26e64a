"""A text as windows of tokens: encoded once without special tokens, and cut without overlap."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int

from xquant_jax.errors import ConfigError
from xquant_jax.model.loading import Model


@dataclasses.dataclass(frozen=True)
class Windows:
    """A text, cut: tokens of each window, and how many bytes of the text tokens 2 ... N of it stand for."""

    tokens: Int[np.ndarray, "W N"]
    predicted_bytes: Int[np.ndarray, " W"]
    text_sha256: str


def read_text(path: Path) -> str:
    """A file's text. Raises `ConfigError` if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at {error.start} ({error.reason}); "
            f"convert it first, for example with iconv"
        ) from error


def cut(model: Model, text: str, seq_len: int, limit: int | None = None) -> Windows:
    """The first `limit` windows (None: all) of `seq_len` tokens; what does not fill one is dropped.

    The bytes of a window's predicted tokens are those of the UTF-8 text from where its second token starts to where
    the next window does.
    """
    if model.tokenizer is None:
        raise ConfigError("this model has no tokenizer.json, and a text cannot be evaluated without")
    if seq_len < 2:
        raise ConfigError(f"seq_len={seq_len} leaves no token to predict; choose 2 or more")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit_windows={limit} leaves nothing to measure; choose 1 or more")
    encoding = model.tokenizer.backend.encode(text, add_special_tokens=False)
    count = len(encoding.ids) // seq_len
    if count == 0:
        raise ConfigError(
            f"the text has {len(encoding.ids)} tokens, less than one window of seq_len={seq_len}; "
            f"choose a longer text or a smaller seq_len"
        )
    count = min(count, limit or count)
    tokens = np.asarray(encoding.ids[: count * seq_len], np.int32).reshape(count, seq_len)
    if tokens.max() >= model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer gives token id {tokens.max()}, and the model's ids are 0 to {model.config.vocab_size - 1}: "
            f"tokenizer.json belongs to another model"
        )
    starts = [start for start, _ in encoding.offsets] + [len(text)]
    predicted = [len(text[starts[w * seq_len + 1] : starts[(w + 1) * seq_len]].encode()) for w in range(count)]
    return Windows(tokens, np.asarray(predicted, np.int64), hashlib.sha256(text.encode()).hexdigest())
