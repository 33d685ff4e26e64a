"""Stop strings and text on the host, with a tokenizer made of single bytes."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from xquant_jax.tokenizer import Tokenizer
from xquant_jax.transcript import Transcript

END = 256


@pytest.fixture
def tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend)


def follow(tokenizer: Tokenizer, text: str, stop: list[str], ended: bool = False) -> tuple[Transcript, list[str]]:
    tokens = tokenizer.encode(text) + [END] * ended
    transcript = Transcript(tokenizer, tokenizer.encode("prompt "), frozenset([END]), stop, len(tokens))
    pieces = [transcript.push(token, -1.0) for token in tokens if transcript.finish_reason is None]
    return transcript, pieces


@pytest.mark.parametrize(
    ("text", "stop", "expected", "reason"),
    [
        ("hello world", [], "hello world", "length"),
        ("hello world", ["wor"], "hello ", "stop"),
        ("hello world", ["rld", "lo w"], "hel", "stop"),
        ("hello world", ["worm"], "hello world", "length"),
        ("aaab", ["aab"], "a", "stop"),
        ("größe 日本", ["日"], "größe ", "stop"),
        ("größe 日本", [], "größe 日本", "length"),
    ],
)
def test_pieces_join_to_the_text_and_stop_strings_never_show(
    tokenizer: Tokenizer, text: str, stop: list[str], expected: str, reason: str
) -> None:
    transcript, pieces = follow(tokenizer, text, stop)
    assert transcript.text == "".join(pieces) == expected
    assert transcript.finish_reason == reason


def test_text_lags_only_while_a_stop_string_is_possible(tokenizer: Tokenizer) -> None:
    _, pieces = follow(tokenizer, "xabxabcx", ["abc"])
    assert pieces == ["x", "", "", "abx", "", "", ""]


def test_a_stop_token_is_kept_among_the_tokens_but_not_in_the_text(tokenizer: Tokenizer) -> None:
    transcript, pieces = follow(tokenizer, "bye", [], ended=True)
    assert transcript.text == "".join(pieces) == "bye"
    assert transcript.tokens[-1] == END
    assert transcript.finish_reason == "stop"
