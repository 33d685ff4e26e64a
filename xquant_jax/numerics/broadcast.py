"""Broadcasting that says which axes it means: the tests let no array gain axes silently."""

from jaxtyping import Array, Float


def along_last(vector: Float[Array, " C"], x: Array) -> Float[Array, "*ones C"]:
    """A vector as one along the last axis of x, to be combined with it."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
