"""What users type for speculative decoding."""

import pytest

from xquant_jax.errors import ConfigError
from xquant_jax.speculation import Speculation


@pytest.mark.parametrize(
    ("text", "speculation"),
    [
        ("lookup:4", Speculation("lookup", 4)),
        ("lookup:15,max=3,min=1", Speculation("lookup", 15, min=1, max=3)),
        ("window:1", Speculation("window", 1)),
        ("window:4,blocks=8", Speculation("window", 4, blocks=8)),
    ],
)
def test_what_is_typed_is_read_and_written(text: str, speculation: Speculation) -> None:
    assert Speculation.parse(text) == speculation
    assert Speculation.parse(str(speculation)) == speculation
    assert Speculation.parse(speculation) is speculation


def test_nothing_is_drafted_unless_asked() -> None:
    assert Speculation.parse(None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lookup:0", "a draft of 0 tokens is not possible; choose 1 to 15"),
        ("window:16", "a draft of 16 tokens is not possible; choose 1 to 15"),
        ("lookup", "'lookup' is not possible; write KIND:TOKENS"),
        ("lookup:", "tokens= is not a whole number"),
        ("lookup:four", "tokens=four is not a whole number"),
        ("medusa:4", "'medusa:4' is not possible; write KIND:TOKENS"),
        ("", "'' is not possible"),
        ("lookup:4,blocks=2", "lookup has no option 'blocks=2'; write min=... or max=..."),
        ("window:4,min=2", "window has no option 'min=2'; write blocks=..."),
        ("lookup:4,min", "lookup has no option 'min'"),
        ("lookup:4,min=1,min=2", "gives min twice"),
        ("lookup:4,min=x", "min=x is not a whole number"),
        ("lookup:4,min=5", "min=5 and max=4 are not possible"),
        ("lookup:4,min=0", "min=0 and max=4 are not possible"),
        ("window:4,blocks=0", "blocks=0 is not possible; choose 1 or more"),
    ],
)
def test_what_cannot_be_honoured_is_a_clear_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Speculation.parse(text)
