"""Stop strings and text on the host, with a tokenizer made of single bytes."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from xquant_jax.generation.transcript import Transcript
from xquant_jax.model.tokenizer import Tokenizer

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


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_prompt_that_ends_within_a_character_does_not_show_in_the_answer(tokenizer: Tokenizer, cut: int) -> None:
    tokens = tokenizer.encode("abc €")
    transcript = Transcript(tokenizer, tokens[:-cut], frozenset([END]), [], cut)
    pieces = [transcript.push(token, -1.0) for token in tokens[-cut:]]
    assert transcript.text == "".join(pieces) == "€"


def test_long_answers_are_whole_whatever_the_length(tokenizer: Tokenizer) -> None:
    text = "Grüße aus 日本, " * 20
    transcript, pieces = follow(tokenizer, text, [])
    assert transcript.text == "".join(pieces) == text


def test_byte_fallback_that_never_becomes_a_character_does_not_end_the_run() -> None:
    """Llama 2 spells unknown characters as bytes; bytes that make no character turn what came before into marks."""
    vocabulary = {"<unk>": 0, "▁a": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    transcript = Transcript(Tokenizer(backend), [1], frozenset(), [], 4)
    pieces = [transcript.push(token, -1.0) for token in (1, 0x0A + 2, 0xE2 + 2, 1)]
    assert "".join(pieces) == transcript.text
    assert transcript.text.startswith(" a")
    assert transcript.text.endswith(" a")


def test_text_lags_only_while_a_stop_string_is_possible(tokenizer: Tokenizer) -> None:
    _, pieces = follow(tokenizer, "xabxabcx", ["abc"])
    assert pieces == ["x", "", "", "abx", "", "", ""]


def test_a_stop_token_is_kept_among_the_tokens_but_not_in_the_text(tokenizer: Tokenizer) -> None:
    transcript, pieces = follow(tokenizer, "bye", [], ended=True)
    assert transcript.text == "".join(pieces) == "bye"
    assert transcript.tokens[-1] == END
    assert transcript.finish_reason == "stop"
