"""Attention to bf16 keys and values through PyTorch, where it is installed: FlashAttention 2, split over keys."""

import statistics

COPIES = 8  # of a layer in a timed run


def seconds(batch: int, context: int, heads: int, kv_heads: int, dim: int, layers: int, repeats: int = 5) -> float:
    """Median time of one layer, the query heads of a key/value head packed. Raises `ImportError` without PyTorch."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

    def draw(length: int, of: int) -> "torch.Tensor":
        return torch.randn(batch, length, of, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    q = draw(1, heads)
    pairs = [(draw(context, kv_heads), draw(context, kv_heads)) for _ in range(layers)]

    def run() -> None:
        for i in range(max(COPIES, layers)):
            torch.nn.functional.scaled_dot_product_attention(q, *pairs[i % layers], enable_gqa=True)

    times = []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        run()
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / max(COPIES, layers))
    return statistics.median(times)
