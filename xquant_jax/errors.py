"""The errors a user can meet. Every message names the value, the rule and the way out."""


class XQuantError(Exception):
    """Base of all errors raised on purpose; the command line prints it without a traceback."""


class ConfigError(XQuantError, ValueError):
    """A model, cache or sampling option that cannot be honoured."""


class CheckpointError(XQuantError):
    """A checkpoint on disk that is missing, truncated, inconsistent or not finite."""


class CacheFullError(XQuantError):
    """The cache cannot hold the prompt and the new tokens."""


class PromptError(XQuantError, ValueError):
    """A prompt that is empty or holds a token id outside the vocabulary."""


class XQuantWarning(UserWarning):
    """Something that works and may not be what is wanted; the command line prints it in one line."""
