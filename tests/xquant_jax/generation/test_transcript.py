"""Tokens as text, piece by piece, and stop strings: with tokenizers of both kinds, and with those of real models."""

from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from xquant_jax.generation.request import CheckedRequest
from xquant_jax.generation.transcript import Transcript
from xquant_jax.model.loading import DEMO
from xquant_jax.model.tokenizer import Tokenizer

END = 256


def byte_level() -> Tokenizer:
    """Every byte is a token; 256 is special, 257 is not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    backend.add_tokens([AddedToken("<think>", special=False)])
    return Tokenizer(backend)


def byte_fallback() -> Tokenizer:
    """As Llama 2's: words with their spaces, bytes where there is no word, one space of the beginning dropped."""
    words = ["▁", "▁a", "b", "é", "▁日", "本", "▁▁"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": byte + 3 for byte in range(256)}}
    vocabulary |= {word: 259 + i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(chain)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


KINDS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return KINDS["byte level"]


def asked(tokens: list[int], size: int, **options: object) -> CheckedRequest:
    return CheckedRequest("", tokens, max_new_tokens=size, **options)  # pyright: ignore[reportArgumentType]


def answered(tokenizer: Tokenizer, prompt: list[int], answer: list[int], **options: object) -> Transcript:
    """The transcript of an answer; its pieces, which are its text, were told in order."""
    transcript = Transcript(tokenizer, asked(prompt, len(answer), **options))
    pieces = [transcript.push(token, -1.0) for token in answer if transcript.finish_reason is None]
    assert "".join(pieces) == transcript.text
    return transcript


def by_definition(tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> str:
    """The text of both less that of the prompt; of a prompt that ends within a character, up to the character."""
    whole = tokenizer.decode([*prompt, *answer])
    for end in range(len(prompt), -1, -1):
        if whole.startswith(before := tokenizer.decode(prompt[:end])):
            return whole[len(before) :]
    raise AssertionError("every text begins with no text")


PARTS = st.lists(st.text("ab é日本€\n👍🏽", max_size=8) | st.lists(st.integers(0, 257), max_size=6), max_size=6)
"""Texts in which characters have several tokens, and tokens at random."""


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(parts=PARTS, place=st.floats(0, 1))
@hypothesis.settings(max_examples=400, deadline=None)
def test_pieces_are_the_text_of_the_whole_less_that_of_the_prompt(kind: str, parts: list, place: float) -> None:
    tokenizer = KINDS[kind]
    texts = [tokenizer.encode(part, special_tokens=False) if isinstance(part, str) else part for part in parts]
    both = [token for tokens in texts for token in tokens]
    hypothesis.assume(len(both) > 1)
    cut = int(place * (len(both) - 1))  # within a character as well
    prompt, answer = both[:cut], both[cut:]
    assert answered(tokenizer, prompt, answer).text == by_definition(tokenizer, prompt, answer)


@pytest.mark.parametrize("name", ["demo", "stories260K"])
def test_texts_of_real_tokenizers_are_the_same_cut_anywhere(name: str, request: pytest.FixtureRequest) -> None:
    directory: Path = DEMO if name == "demo" else request.getfixturevalue("shared") / "models" / name
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    text = "Once upon a time, a girl called 日本語のテキスト met မြန်မာ. 👩‍👩‍👧 naïve\n\tdef f(x): return x  # ☂\n"
    tokens = tokenizer.encode(text)
    for cut in range(1, len(tokens)):
        prompt, answer = tokens[:cut], tokens[cut:]
        assert answered(tokenizer, prompt, answer).text == by_definition(tokenizer, prompt, answer)
    assert answered(tokenizer, tokens[:1], tokens[1:]).text.endswith("# ☂\n")


def follow(tokenizer: Tokenizer, text: str, stop: list[str], ended: bool = False) -> tuple[Transcript, list[str]]:
    tokens = tokenizer.encode(text) + [END] * ended
    transcript = Transcript(
        tokenizer, asked(tokenizer.encode("prompt "), len(tokens), stop=tuple(stop), stop_ids=(END,))
    )
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
        ("one\n\ntwo", ["\n"], "one", "stop"),
    ],
)
def test_pieces_join_to_the_text_and_stop_strings_never_show(
    tokenizer: Tokenizer, text: str, stop: list[str], expected: str, reason: str
) -> None:
    transcript, pieces = follow(tokenizer, text, stop)
    assert transcript.text == "".join(pieces) == expected
    assert transcript.finish_reason == reason


@hypothesis.given(st.text("ab<end>é\n", max_size=20), st.lists(st.text("ab<end>é", min_size=1, max_size=4), max_size=3))
@hypothesis.settings(deadline=None)
def test_an_answer_ends_where_the_first_stop_string_is_whole(text: str, stop: list[str]) -> None:
    tokenizer = KINDS["byte level"]
    tokens = tokenizer.encode(text)
    hypothesis.assume(tokens)
    transcript = answered(tokenizer, [65], tokens, stop=tuple(stop))
    ends = [(text.find(s) + len(s.encode()), s) for s in stop if s in text]
    shown = [text[: text.find(s)] for _, s in ends]
    assert transcript.finish_reason == ("stop" if ends else "length")
    assert transcript.text in (shown or [tokenizer.decode(tokens)])
    assert not any(s in transcript.text for s in stop)


def test_a_stop_string_of_bytes_ends_the_answer_at_its_last_byte() -> None:
    """Whatever would follow: the run of bytes ends there."""
    tokenizer = KINDS["byte fallback"]
    prompt, answer = tokenizer.encode(" a"), tokenizer.encode("日本語。テキスト", special_tokens=False)
    transcript = answered(tokenizer, prompt, answer, stop=("。",))
    assert (transcript.text, transcript.finish_reason) == ("日本語", "stop")
    assert len(transcript.tokens) < len(answer)


SPECIAL_STOPS = [
    (["hi", END, "more"], ("<end>",), "hi", 3),
    (["hi", END, "more"], ("i<end>",), "h", 3),
    (["hi", END, "\nmore"], ("<end>\n",), "hi", 4),
    (["hi", END, "\nmore"], ("<end>m", "<end>\n"), "hi", 4),
    (["hi", END, "more", END, "\n"], ("<end>\n",), "himore", 9),
    (["hi<end>"], ("<end>",), "hi", 3),  # tokenized, a special token in a text is one
]


@pytest.mark.parametrize(("parts", "stop", "text", "size"), SPECIAL_STOPS)
def test_stop_strings_of_special_tokens_end_the_answer_at_the_tokens(
    tokenizer: Tokenizer, parts: list, stop: tuple[str, ...], text: str, size: int
) -> None:
    answer = [id for part in parts for id in ([part] if isinstance(part, int) else tokenizer.encode(part))]
    transcript = answered(tokenizer, [65], answer, stop=stop)
    assert (transcript.text, len(transcript.tokens), transcript.finish_reason) == (text, size, "stop")


def test_nothing_ends_an_answer_before_its_least_tokens(tokenizer: Tokenizer) -> None:
    answer = tokenizer.encode("a.b.c.d")
    transcript = answered(tokenizer, [65], answer, stop=(".",), min_tokens=4)
    assert (transcript.text, len(transcript.tokens)) == ("a.b.c", 6)


@pytest.mark.parametrize("least", range(6))
def test_the_least_tokens_may_end_within_a_character(least: int) -> None:
    tokenizer = KINDS["byte fallback"]
    answer = [*tokenizer.encode("日a. x", special_tokens=False), 260]
    expected = "日a" if least < 5 else "日a. x a"
    assert answered(tokenizer, [260], answer, stop=(".",), min_tokens=least).text == expected


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_prompt_that_ends_within_a_character_does_not_show_in_the_answer(tokenizer: Tokenizer, cut: int) -> None:
    tokens = tokenizer.encode("abc €")
    assert answered(tokenizer, tokens[:-cut], tokens[-cut:]).text == "€"


def test_a_prompt_of_bytes_does_not_come_out_again() -> None:
    """All of a run of bytes is text or marks; the prompt's part of it is not the answer's."""
    tokenizer = KINDS["byte fallback"]
    tokens = tokenizer.encode("語テキスト", special_tokens=False)
    assert answered(tokenizer, [1, *tokens[:7]], [*tokens[7:], 260]).text == "キスト a"


def test_long_answers_are_whole_whatever_the_length(tokenizer: Tokenizer) -> None:
    text = "Grüße aus 日本, " * 20
    transcript, pieces = follow(tokenizer, text, [])
    assert transcript.text == "".join(pieces) == text


def test_text_lags_only_while_a_stop_string_is_possible(tokenizer: Tokenizer) -> None:
    _, pieces = follow(tokenizer, "xabxabcx", ["abc"])
    assert pieces == ["x", "", "", "abx", "", "", ""]


def test_a_stop_token_is_kept_among_the_tokens_but_not_in_the_text(tokenizer: Tokenizer) -> None:
    transcript, pieces = follow(tokenizer, "bye", [], ended=True)
    assert transcript.text == "".join(pieces) == "bye"
    assert transcript.tokens[-1] == END
    assert transcript.finish_reason == "stop"


def test_what_was_held_back_is_shown_before_an_error(tokenizer: Tokenizer) -> None:
    transcript = Transcript(tokenizer, asked([65], 9, stop=("abc",)))
    assert [transcript.push(token, -1.0) for token in tokenizer.encode("xab")] == ["x", "", ""]
    assert transcript.fail("overflow") == "ab"
    assert (transcript.text, transcript.finish_reason, transcript.error) == ("xab", "error", "overflow")


def test_a_text_gets_the_special_tokens_of_its_beginning_once() -> None:
    from tokenizers.processors import TemplateProcessing

    backend = byte_fallback().backend
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = Tokenizer(backend)
    plain = tokenizer.encode("b", special_tokens=False)
    assert tokenizer.encode("b") == tokenizer.encode("<s>b") == [1, *plain, 2] == backend.encode("b").ids
    assert tokenizer.encode("<s>b", special_tokens=False) == [1, *plain]
    assert tokenizer.encode("</s>b") == [1, 2, *plain, 2]
