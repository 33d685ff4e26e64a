"""Which backend runs: by name, by device, by shape, and what users are told about it."""

import jax
import jax.numpy as jnp
import pytest

import xquant_jax as xq
from pallas_kernels import api, recorded, remat_project, target
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.quantization import Blocks, StreamSpec, quantize


def blocks(width: int = 128, bits: int = 4) -> Blocks:
    return quantize(jnp.zeros((1, 1, 128, width)), StreamSpec(width, bits))


def chosen(stream: Blocks, implementation: str | None = None) -> set[str]:
    with recorded() as names:
        jax.eval_shape(lambda s, w: remat_project(s, w, implementation=implementation), stream, jnp.zeros((128, 128)))
    return names


def test_the_target_is_the_default_device_unless_a_context_says_otherwise() -> None:
    assert target.current() == target.Target("cpu", interpret=False)
    with target.compiling_for("tpu"):
        assert target.current() == target.Target("tpu", interpret=False)
        with target.interpreted():
            assert target.current() == target.Target("tpu", interpret=True)
    assert target.current() == target.Target("cpu", interpret=False)


def test_a_function_is_traced_anew_for_another_target() -> None:
    seen = []

    @jax.jit
    def f(x):
        seen.append(target.current().platform)
        return x

    f(1.0)
    with target.compiling_for("tpu"):
        f.trace(1.0)
    f(1.0)
    assert seen == ["cpu", "tpu"]


def test_none_takes_the_kernels_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_refusal", lambda name, *args, **kwargs: None)
    for platform, kernels in {"cpu": "xla", "tpu": "pallas_tpu", "gpu": "triton"}.items():
        with target.compiling_for(platform):
            assert api.choose(None, "remat_project", blocks()) == kernels


def test_none_warns_once_where_a_kernel_cannot_take_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_refusal", lambda name, *args, **kwargs: "no such shape")
    api._warn_once.cache_clear()
    with target.compiling_for("tpu"):
        with pytest.warns(UserWarning, match=r"remat_project runs without a kernel.*pallas_tpu: no such shape"):
            assert chosen(blocks()) == {"xla"}
        assert chosen(blocks()) == {"xla"}  # a second warning would be an error here


def test_a_name_whose_backend_cannot_take_the_shapes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_refusal", lambda name, *args, **kwargs: "no such shape")
    monkeypatch.setattr(api, "check", lambda implementation: None)
    with (
        target.compiling_for("tpu"),
        pytest.raises(ConfigError, match=r"'pallas_tpu' cannot run remat_project: no such shape"),
    ):
        chosen(blocks(), "pallas_tpu")


def test_a_name_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"implementation='cuda' is not available; choose None or \['pallas_gpu'"):
        chosen(blocks(), "cuda")


def test_a_backend_for_another_device_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'pallas_tpu' runs on tpu, and this device is a cpu; choose .*\['xla'\]"):
        chosen(blocks(), "pallas_tpu")


def test_a_backend_whose_package_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name="jax_triton")

    monkeypatch.setattr(api, "_module", missing)
    with (
        target.interpreted(),
        pytest.raises(ConfigError, match=r"needs jax_triton, which is not installed; pip install 'xquant-jax\[gpu\]'"),
    ):
        chosen(blocks(), "triton")


def test_loading_refuses_a_backend_that_the_device_cannot_run() -> None:
    with pytest.raises(ConfigError, match="'pallas_tpu' runs on tpu"):
        xq.load("demo", implementation="pallas_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["xquant:4", "xquant-cl:4"])
def test_generate_says_which_implementation_ran(cache: str) -> None:
    prompt = [5 + i % 250 for i in range(140)]  # one block of history
    reference = xq.generate(xq.load("demo"), [prompt], cache=cache, max_new_tokens=2)
    assert reference.implementation == "xla"
    with target.interpreted():
        model = xq.load("demo", implementation="pallas_tpu")
        result = xq.generate(model, [prompt], cache=cache, max_new_tokens=2)
    assert result.implementation == "pallas_tpu"
    assert result.results[0].tokens == reference.results[0].tokens


def test_a_method_that_no_kernel_has_a_form_of_is_an_error_by_name_and_a_warning_else() -> None:
    prompt = [5 + i % 250 for i in range(300)]
    with target.interpreted():
        model = xq.load("demo", implementation="pallas_tpu")
        with pytest.raises(ConfigError, match=r"cannot run decode_attention: it has no form of kvquant"):
            xq.generate(model, [prompt], cache="kvquant:4", max_new_tokens=3)
    api._warn_once.cache_clear()
    with target.compiling_for("tpu"), pytest.warns(UserWarning, match=r"pallas_tpu: it has no form of xquant-cl"):
        api.decode_without_kernel(None, "it has no form of xquant-cl with these options")
