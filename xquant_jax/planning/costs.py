"""What a step costs in operations, bytes and seconds, and what fits: of one cache method on one model."""

import dataclasses
import math
from functools import cached_property
from typing import Any

import jax
import numpy as np

from xquant_jax.cache.config import CacheConfig
from xquant_jax.cache.state import Cache, CacheBytes, allocate, cache_bytes
from xquant_jax.config import ModelConfig
from xquant_jax.numerics.packing import BLOCK
from xquant_jax.planning import kernel_costs
from xquant_jax.planning.counting import StepOperations, step_operations
from xquant_jax.planning.devices import Device
from xquant_jax.planning.row import Row, Speculating, Step
from xquant_jax.planning.shapes import method_param_bytes, parameter_shapes, size
from xquant_jax.speculation import Speculation

CHUNK = 512
"""Prompt tokens fed at once, as in `generate`."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one cache method costs a model, by context and batch, in bytes and operations. `chunk`: prompt tokens fed at
    once."""

    config: ModelConfig
    cache_config: CacheConfig
    chunk: int = CHUNK

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(self.config)))

    @cached_property
    def weights(self) -> int:
        """Bytes of all parameters."""
        return size(parameter_shapes(self.config))

    @property
    def method_params(self) -> int:
        """Bytes of what the method multiplies with, where these are not parameters already."""
        return self._method_params[0]

    def cache(self, batch: int, context: int) -> CacheBytes:
        """Bytes of a cache for so many sequences and tokens each."""
        return cache_bytes(self._allocated(batch, context))

    def total(self, batch: int, context: int) -> int:
        """Bytes of weights, the method's matrices and cache."""
        return self.weights + self.method_params + self.cache(batch, context).total

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one more token of one sequence takes, in all layers."""
        return self._block_bytes / BLOCK

    def largest_context(self, usable: int, batch: int) -> int:
        """Tokens of each of `batch` sequences that fit into so many bytes."""
        room = usable - self.total(batch, BLOCK)
        blocks = 0 if room < 0 else 1 + room // (batch * self._block_bytes)
        return blocks * BLOCK + BLOCK - 1 if blocks else 0

    def largest_batch(self, usable: int, context: int) -> int:
        """Sequences of so many tokens that fit into so many bytes."""
        one, two = self.total(1, context), self.total(2, context)
        return max(0, 1 + (usable - one) // (two - one))

    def decode(self, batch: int, context: Any, new: int = 1, kept: float = 1.0) -> tuple[Any, Any]:
        """Operations and bytes of a step with `context` tokens in every sequence; contexts may be an array.

        new: tokens of every sequence that it computes; kept: those of them that the cache keeps, on average
        """
        step = self._operations(new, all_logits=True)
        flops = step.once + kept * step.flush / BLOCK + self._history_operations(step, context)
        return batch * flops, self._read_once + batch * (self._window + self._history_bytes(context))

    def decode_seconds(self, device: Device, batch: int, context: Any, new: int = 1, kept: float = 1.0) -> Any:
        """Seconds of such a step: a roofline, but for the layers whose kernels were counted on this device."""
        flops, moved = self.decode(batch, context, new, kept)
        counted = self._counted(device)
        if not counted.any():
            return device.seconds(flops, moved)
        history = batch * self._history_operations(self._operations(new, all_logits=True), context, counted)
        read = batch * self._history_bytes(context, counted)
        return device.seconds(flops - history, moved - read) + batch * self._kernel_seconds(device, context, new)

    def step(self, device: Device, batch: int, context: int) -> Step:
        """The step on a device, and what bounds it."""
        flops, moved = self.decode(batch, context)
        seconds = float(self.decode_seconds(device, batch, context))
        bound = "compute" if flops / moved > device.ridge else "memory"
        if 2 * batch * self._kernel_seconds(device, context) > seconds:
            bound = "kernels"
        return Step(float(flops), float(moved), seconds, float(flops / moved), bound)

    def counted(self, device: Device) -> bool:
        """Whether the kernels of any layer were counted on this device."""
        return bool(self._counted(device).any())

    def prefill(self, device: Device, batch: int, context: int) -> float:
        """Seconds to feed `context` tokens of every sequence, chunk by chunk."""
        step = self._operations(self.chunk)
        before = np.arange(0, context, self.chunk, dtype=np.float64)  # tokens that a chunk finds stored
        share = np.minimum(context - before, self.chunk) / self.chunk  # of the last chunk only so much is needed
        flops = (step.once + step.flush) * share + self._history_operations(step, before)
        moved = self._read_once + batch * (self._window + self._history_bytes(before))
        return float(device.seconds(batch * flops, moved).sum())

    def speculate(
        self, device: Device, batch: int, context: int, speculation: Speculation, acceptance: float
    ) -> Speculating:
        """Decoding with drafts, of whose tokens each is accepted with this probability if the ones before it are.

        A draft of n tokens is verified in one step of n + 1. Drafts from the window are n steps over the newest blocks;
        those that are looked up cost nothing.
        """
        made = sum(acceptance**n for n in range(speculation.tokens + 1))  # Leviathan et al. 2023, formula 1
        verify = float(self.decode_seconds(device, batch, context, new=speculation.tokens + 1, kept=made))
        draft = 0.0
        if speculation.kind == "window":
            newest = min(context, speculation.blocks * BLOCK)
            draft = speculation.tokens * float(self.decode_seconds(device, batch, newest, kept=0.0))
        rate = batch * made / (draft + verify)
        without = batch / float(self.decode_seconds(device, batch, context))
        return Speculating(made, draft, verify, rate, rate / without)

    def row(
        self,
        device: Device,
        usable: int,
        context: int,
        batch: int,
        speculation: Speculation | None = None,
        acceptance: float = 0.0,
    ) -> Row:
        """Everything at this context and batch, on a device of which so many bytes can be used; `speculation` and
        `acceptance` as in `speculate`."""
        largest = self.largest_batch(usable, context)
        step = self.step(device, batch, context)
        cache = self.cache(batch, context)
        total = self.weights + self.method_params + cache.total
        sizes = {"weights": self.weights, "factors": self.method_params, **dataclasses.asdict(cache), "total": total}
        return Row(
            cache=str(self.cache_config),
            bytes_per_token=self.bytes_per_token,
            memory=sizes,
            fits=total <= usable,
            largest_context=self.largest_context(usable, batch),
            largest_batch=largest,
            prefill_s=self.prefill(device, batch, context),
            decode=step,
            counted=self.counted(device),
            tokens_per_second=batch / step.seconds,
            best=float(largest / self.decode_seconds(device, largest, context)) if largest else None,
            speculating=self.speculate(device, batch, context, speculation, acceptance) if speculation else None,
        )

    @cached_property
    def _method_params(self) -> tuple[int, int]:
        return method_param_bytes(self.config, _at_four_bits(self.cache_config))

    def _operations(self, tokens: int, *, all_logits: bool = False) -> StepOperations:
        return step_operations(self.config, _at_four_bits(self.cache_config), tokens, all_logits and tokens > 1)

    def _allocated(self, batch: int, context: int) -> Cache:
        sizes: dict[str, Any] = {"batch": batch, "tokens": context}
        return jax.eval_shape(lambda: allocate(self.cache_config, self.config, **sizes))

    @cached_property
    def _one_block(self) -> Cache:
        """The cache of one sequence with room for one block."""
        return self._allocated(1, BLOCK)

    @cached_property
    def _block_bytes(self) -> int:
        """Bytes of one block of a sequence in all layers, running sum included."""
        return sum(size(segment.history) for segment in self._one_block.segments) + size(self._one_block.running_sum)

    @property
    def _window(self) -> int:
        return cache_bytes(self._one_block).window

    @property
    def _read_once(self) -> int:
        """Bytes of weights and factors that a step reads; of an embedding that is not the head too, only rows."""
        embedding = 0 if self.config.tied_embeddings else size(parameter_shapes(self.config)["embed"])
        return self.weights - embedding + self._method_params[1]

    def _history_operations(self, step: StepOperations, context: Any, layers: Any = True) -> Any:
        """Operations on a sequence's history: every layer attends to what its sliding window reaches, and adds all
        that is stored to the running sum. `layers`: which of them count."""
        attend, accumulate = (
            np.where(layers, np.asarray(each, np.float64), 0) for each in (step.attend, step.accumulate)
        )
        return (attend @ self._in_reach(context) + accumulate.sum() * context) / BLOCK

    def _history_bytes(self, context: Any, layers: Any = True) -> Any:
        """Bytes of a sequence's history that a step moves.

        A layer reads what it has stored as far as its sliding window reaches; one with a running sum reads all of it,
        and reads and writes the whole sum, which the layers above need. `layers`: which of them count.
        """
        reach, moved, start = self._in_reach(context), 0, 0
        counts = np.broadcast_to(layers, self.config.num_layers)
        for segment in self._one_block.segments:
            of_layer, end = size(segment.history) // segment.num_layers, start + segment.num_layers
            if segment.method.has_running_sum:
                of_layer += 2 * size(self._one_block.running_sum)
                moved += counts[start:end].sum() * of_layer * context
            else:
                moved += of_layer * (counts[start:end] @ reach[start:end])
            start = end
        return moved / BLOCK

    def _kernel_seconds(self, device: Device, context: Any, new: int = 1) -> Any:
        """What the counted kernels take for the history of one sequence and so many new tokens."""
        seconds, reach, start = 0.0, self._in_reach(context), 0
        for (method, layers), each in zip(self._segments, self._seconds_per_token(device, new), strict=True):
            tokens = layers * context if method.has_running_sum else reach[start : start + layers].sum(axis=0)
            seconds = seconds + (each or 0.0) * tokens
            start += layers
        return seconds

    def _counted(self, device: Device) -> np.ndarray:
        """By layer, whether its kernels were counted on this device."""
        known = [each is not None for each in self._seconds_per_token(device)]
        return np.repeat(known, [layers for _, layers in self._segments])

    def _seconds_per_token(self, device: Device, new: int = 1) -> list[float | None]:
        """By segment, what its kernels take for a cached token of a layer."""
        return [kernel_costs.seconds_per_token(device, self.config, method, new) for method, _ in self._segments]

    @cached_property
    def _segments(self) -> Any:
        return self.cache_config.segments(self.config)

    def _in_reach(self, context: Any) -> Any:
        """By layer, how many of `context` tokens a new one attends to: all, or those in the layer's sliding window."""
        windows = [window or math.inf for window in self.config.sliding_windows]
        return np.minimum.outer(windows, context)


def _at_four_bits(cache_config: CacheConfig) -> CacheConfig:
    """The same method with 4 bits everywhere: operations, and what they multiply with, do not depend on them."""
    method: Any = cache_config.method
    if "bits" not in {field.name for field in dataclasses.fields(method)}:
        return cache_config
    first = {"first": (method.plain[0], 4)} if hasattr(method, "plain") else {}
    return CacheConfig(dataclasses.replace(method, bits=4, **first))
