"""What users type for speculative decoding: where drafts come from, and how long they are."""

import dataclasses
from typing import ClassVar

from xquant_jax.errors import ConfigError

LONGEST_DRAFT = 15
"""Tokens of a draft: with the one before it they are as many as decoding attends for at once."""

LONGEST_MATCH = 32
"""Tokens that are compared at most."""


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How tokens are drafted before the model checks them, all in one step; see `parse`.

    kind: `lookup`, what followed the same tokens earlier in prompt or answer (Saxena 2023, prompt lookup decoding), or
        `window`, what the model itself says when it attends to the first tokens and the newest ones only (Xiao et al.
        2024, arXiv 2309.17453)
    tokens: of a draft, 1 to 15
    min, max: of `lookup`, how many tokens must be the same, and how many are compared; the longest match counts
    blocks: of `window`, the newest blocks of 128 tokens that are attended to, beside those that are not quantized yet
    """

    kind: str
    tokens: int
    min: int = 2
    max: int = 4
    blocks: int = 4

    OPTIONS: ClassVar[dict[str, tuple[str, ...]]] = {"lookup": ("min", "max"), "window": ("blocks",)}

    def __post_init__(self) -> None:
        if self.kind not in self.OPTIONS:
            raise ConfigError(f"a draft from {self.kind!r} is not known; choose {' or '.join(self.OPTIONS)}")
        if not 1 <= self.tokens <= LONGEST_DRAFT:
            raise ConfigError(f"a draft of {self.tokens} tokens is not possible; choose 1 to {LONGEST_DRAFT}")
        if not 1 <= self.min <= self.max <= LONGEST_MATCH:
            raise ConfigError(
                f"min={self.min} and max={self.max} are not possible; choose 1 <= min <= max <= {LONGEST_MATCH}"
            )
        if self.blocks < 1:
            raise ConfigError(f"blocks={self.blocks} is not possible; choose 1 or more")

    @classmethod
    def parse(cls, spec: "str | Speculation | None") -> "Speculation | None":
        """From `lookup:4`, `lookup:8,min=1,max=3`, `window:4`, `window:4,blocks=8`; None stays None.

        Raises `ConfigError` naming the part that cannot be honoured.
        """
        if spec is None or isinstance(spec, Speculation):
            return spec
        if not isinstance(spec, str):
            raise ConfigError(f"speculate={spec!r} is not possible; give a text such as lookup:4 or window:4, or None")
        head, *options = spec.split(",")
        kind, colon, tokens = head.partition(":")
        if not colon or kind not in cls.OPTIONS:
            raise ConfigError(f"speculate={spec!r} is not possible; write KIND:TOKENS, such as lookup:4 or window:4")
        values = {"tokens": _number("tokens", tokens)}
        for option in options:
            key, equals, value = option.partition("=")
            if not equals or key not in cls.OPTIONS[kind]:
                raise ConfigError(
                    f"{kind} has no option {option!r}; write {' or '.join(f'{name}=...' for name in cls.OPTIONS[kind])}"
                )
            if key in values:
                raise ConfigError(f"speculate={spec!r} gives {key} twice")
            values[key] = _number(key, value)
        return cls(kind, **values)

    def __str__(self) -> str:
        own = {name: getattr(self, name) for name in self.OPTIONS[self.kind]}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        options = [f"{name}={value}" for name, value in own.items() if value != defaults[name]]
        return ",".join([f"{self.kind}:{self.tokens}", *options])


def _number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name}={value} is not a whole number") from None
