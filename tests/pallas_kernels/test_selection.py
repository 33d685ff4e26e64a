"""Which backend runs: by name, by device, by shape, and what users are told about it."""

import dataclasses
import importlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
import xquant_jax as xq
from pallas_kernels import Quantize, RematProject, api, recorded, target
from xquant_jax.errors import ConfigError
from xquant_jax.numerics.quantization import StreamSpec, quantize

GPU = "pallas_kernels.triton"


def project(width: int = 128) -> RematProject:
    return RematProject(quantize(jnp.zeros((1, 1, 128, width)), StreamSpec(width, 4)), jnp.zeros((width, 128)))


def ran(call: Any, implementation: str | None = None) -> set[str]:
    """What is recorded of a call while it is traced."""
    with recorded() as names:
        jax.eval_shape(lambda call: pallas_kernels.run(call, implementation), call)
    return names


@pytest.fixture
def no_imports_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules break when they are imported, with all that they need installed."""
    load = importlib.import_module

    def broken(name: str) -> Any:
        if name.startswith(GPU):
            raise ModuleNotFoundError("No module named 'jax.lost'", name="jax.lost")
        return load(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    monkeypatch.setattr(api, "not_installed", lambda name: None)


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


@pytest.fixture
def refusing_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("pallas_kernels.pallas_tpu.remat_project"), "refuse", lambda call: "no")


@pytest.mark.parametrize(("platform", "kernels"), [("cpu", "xla"), ("tpu", "pallas_tpu"), ("gpu", "triton")])
def test_none_takes_the_kernels_of_the_device(platform: str, kernels: str) -> None:
    if kernels != "xla" and (reason := api.not_installed(kernels)):
        pytest.skip(reason)
    call = project()
    with target.compiling_for(platform):
        assert api.choose(call.replace(weight=call.weight.astype(jnp.bfloat16))) == kernels


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_on_a_gpu_quantize_is_left_to_xla_and_recorded_as_its(implementation: str | None) -> None:
    if reason := api.not_installed("triton"):
        pytest.skip(reason)
    with target.compiling_for("gpu"):
        assert ran(Quantize(jnp.zeros((1, 1, 128, 128)), StreamSpec(128, 4)), implementation) == {"xla"}


@pytest.mark.usefixtures("refusing_everything")
def test_none_warns_once_where_a_kernel_cannot_take_the_shapes() -> None:
    api._warn_once.cache_clear()
    with target.compiling_for("tpu"):
        with pytest.warns(UserWarning, match=r"remat_project runs without a kernel.*pallas_tpu: no"):
            assert ran(project()) == {"xla"}
        assert ran(project()) == {"xla"}  # a second warning would be an error here


@pytest.mark.usefixtures("refusing_everything")
def test_a_name_whose_backend_cannot_take_the_shapes_is_an_error() -> None:
    with target.compiling_for("tpu"), pytest.raises(ConfigError, match=r"'pallas_tpu' cannot run remat_project: no"):
        ran(project(), "pallas_tpu")


def test_a_name_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"implementation='cuda' is not available; choose None or \['pallas_gpu'"):
        ran(project(), "cuda")


def test_a_backend_for_another_device_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"'pallas_tpu' runs on tpu, and this device is a cpu; choose .*\['xla'\]"):
        ran(project(), "pallas_tpu")


def test_a_backend_whose_package_is_not_installed_is_an_error_that_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax_triton" else find(name))
    message = r"needs jax_triton, not installed here; pip install 'xquant-jax\[gpu\]'"
    with target.interpreted(), pytest.raises(ConfigError, match=message):
        ran(project(), "triton")
    api._warn_once.cache_clear()
    with target.compiling_for("gpu"), pytest.warns(UserWarning, match=message):
        assert ran(project()) == {"xla"}


@pytest.mark.usefixtures("no_imports_of_triton")
def test_a_backend_that_is_installed_and_broken_is_an_error_that_says_what_broke() -> None:
    message = r"cannot be imported, although .* ModuleNotFoundError: No module named 'jax.lost'; mend that package"
    with target.interpreted(), pytest.raises(ConfigError, match=message):
        ran(project(), "triton")
    api._warn_once.cache_clear()
    with target.compiling_for("gpu"), pytest.warns(UserWarning, match=message):
        assert ran(project()) == {"xla"}


def test_loading_refuses_a_backend_that_the_device_cannot_run() -> None:
    with pytest.raises(ConfigError, match="'pallas_tpu' runs on tpu"):
        xq.load("demo", implementation="pallas_tpu")


def test_loading_refuses_a_backend_that_cannot_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(api.BACKENDS, "pallas_gpu", api.Backend("gpu", kernels=("remat_project",)))
    message = (
        r"'pallas_gpu' has kernels for remat_project only, none for accumulate, decode_attention, quantize; "
        r"choose None or \['triton', 'xla'\]"
    )
    with target.compiling_for("gpu"), pytest.raises(ConfigError, match=message):
        xq.load("demo", implementation="pallas_gpu")


def test_two_threads_do_not_record_each_others_backends() -> None:
    seen: dict[str, set[str]] = {}
    both_record = threading.Barrier(2)

    def trace(platform: str) -> None:
        with target.compiling_for(platform), recorded() as names:
            both_record.wait()
            jax.eval_shape(pallas_kernels.run, project())
            both_record.wait()
        seen[platform] = names

    threads = [threading.Thread(target=trace, args=(platform,)) for platform in ("cpu", "tpu")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"cpu": {"xla"}, "tpu": {"pallas_tpu"}}


@pytest.mark.slow
def test_generate_says_which_implementation_ran() -> None:
    """As many layers as there are kinds: a plain one, the base of the running sum and one above it."""
    if reason := api.not_installed("triton"):  # its interpreter compiles nothing
        pytest.skip(reason)
    demo = xq.load("demo")
    config = dataclasses.replace(demo.config, num_layers=3, sliding_windows=(None,) * 3)
    layers = jax.tree.map(lambda a: a[:3], demo.params["layers"])
    model = dataclasses.replace(demo, transformer=xq.Transformer(config), params={**demo.params, "layers": layers})
    prompt = [5 + i % 250 for i in range(140)]  # one block of history
    options: dict[str, Any] = {"cache": "xquant-cl:2,first=1@4", "max_new_tokens": 2}
    reference = xq.generate(model, [prompt], **options)
    assert reference.implementation == "xla"
    with target.interpreted():
        result = xq.generate(dataclasses.replace(model, implementation="triton"), [prompt], **options)
    assert result.implementation == "triton"
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
