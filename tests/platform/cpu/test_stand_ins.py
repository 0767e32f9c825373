"""The host meanings of CUDA names, observed in a process of their own: they change torch for good."""

import importlib
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed

FACTORIES = {
    "empty": lambda **k: torch.empty(2, 3, **k),
    "zeros": lambda **k: torch.zeros(2, 3, **k),
    "ones": lambda **k: torch.ones((2, 3), **k),
    "full": lambda **k: torch.full((2, 3), 5.0, **k),
    "tensor": lambda **k: torch.tensor([1.0, 2.0], **k),
    "as_tensor": lambda **k: torch.as_tensor([1.0, 2.0], **k),
    "arange": lambda **k: torch.arange(1, 7, 2, **k),
    "linspace": lambda **k: torch.linspace(0, 1, 5, **k),
    "eye": lambda **k: torch.eye(3, **k),
    "rand": lambda **k: torch.rand(2, 3, **k),
    "randn": lambda **k: torch.randn(2, 3, **k),
    "randint": lambda **k: torch.randint(0, 9, (4,), **k),
    "randperm": lambda **k: torch.randperm(7, **k),
    "empty_like": lambda **k: torch.empty_like(torch.ones(2), **k),
    "zeros_like": lambda **k: torch.zeros_like(torch.ones(2), **k),
    "ones_like": lambda **k: torch.ones_like(torch.ones(2), **k),
    "full_like": lambda **k: torch.full_like(torch.ones(2), 3.0, **k),
    "rand_like": lambda **k: torch.rand_like(torch.ones(2), **k),
    "randn_like": lambda **k: torch.randn_like(torch.ones(2), **k),
    "empty_strided": lambda **k: torch.empty_strided((2, 3), (1, 2), **k),
}
RANDOM = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like")


def observe() -> dict[str, Any]:
    """Everything the tests below look at, from one process that installed the host meanings twice."""
    from megatron.core.tensor_parallel import random
    from torch.utils.checkpoint import checkpoint

    from hacl_megatron.platform.cpu import stand_ins

    seen: dict[str, Any] = {}
    available = torch.cuda.is_available()
    plain = {}
    for name, make in FACTORIES.items():
        torch.manual_seed(3)
        plain[name] = make()

    def everything() -> list:
        changed = [getattr(torch, name) for name in FACTORIES]
        changed += [torch.Tensor.type, torch.Tensor.cuda, torch.nn.Module.cuda]
        return [*changed, torch.cuda.current_device, torch.cuda.manual_seed, random._get_cuda_rng_state]

    original = everything()
    for module, name in _TENSOR_LISTS:  # as where Transformer Engine is installed, which needs CUDA for them
        setattr(importlib.import_module(module), name, _needs_cuda)
    stand_ins.install()
    first = everything()
    stand_ins.install()
    seen["changed"] = all(a is not b for a, b in zip(original, first, strict=True))
    seen["idempotent"] = all(a is b for a, b in zip(first, everything(), strict=True))

    seen["is_available"] = (available, torch.cuda.is_available())
    seen["current_device"] = torch.cuda.current_device()

    devices, values, metas, contexts = {}, {}, {}, {}
    for name, make in FACTORIES.items():
        made = []
        for device in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0), torch.cuda.current_device()):
            torch.manual_seed(3)
            made.append(make(device=device))
        devices[name] = [tensor.device.type for tensor in made]
        if not name.startswith("empty"):
            values[name] = all(torch.equal(tensor, plain[name]) for tensor in made)
        metas[name] = make(device="meta").device.type
        if not name.endswith("_like"):  # those follow their argument
            with torch.device("meta"):
                contexts[name] = make().device.type
    seen.update(devices=devices, values=values, metas=metas, contexts=contexts)
    with torch.device("meta"):
        seen["module on meta"] = {p.device.type for p in torch.nn.Linear(4, 4).parameters()}
        seen["explicit device on meta"] = torch.zeros(2, device="cpu").device.type

    tensor = torch.ones(3)
    seen["cuda() is the tensor"] = tensor.cuda() is tensor
    module = torch.nn.Linear(2, 2)
    seen["cuda() is the module"] = module.cuda(0) is module
    seen["types"] = {
        str(dtype): torch.ones(1, dtype=dtype).type()
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64)
    }
    seen["type of meta"] = torch.ones(1, device="meta").type()
    seen["cast"] = tensor.type(torch.float64).dtype, tensor.type(dtype=torch.int32).dtype

    torch.manual_seed(11)
    seen["torch.manual_seed"] = torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(11)))
    torch.cuda.manual_seed(11)
    seen["cuda.manual_seed"] = torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(11)))
    state = torch.cuda.get_rng_state()
    a = torch.rand(4)
    torch.cuda.set_rng_state(state)
    seen["cuda rng state"] = torch.equal(a, torch.rand(4))

    def tracker_draws() -> list[torch.Tensor]:
        tracker = random.CudaRNGStatesTracker()
        tracker.add("model-parallel-rng", 5)
        torch.manual_seed(1)
        draws = [torch.rand(2)]
        for _ in range(2):
            with tracker.fork("model-parallel-rng"):
                draws.append(torch.rand(2, device="cuda"))
        draws.append(torch.rand(2))
        return draws

    once, again = tracker_draws(), tracker_draws()
    torch.manual_seed(1)
    outside = torch.rand(4)
    generator = torch.Generator().manual_seed(5)
    inside = torch.rand(4, generator=generator)
    seen["fork is reproducible"] = all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    seen["fork leaves the outer stream alone"] = torch.equal(torch.cat([once[0], once[3]]), outside)
    seen["fork goes on where it stopped"] = torch.equal(torch.cat([once[1], once[2]]), inside)

    # Recomputation replays dropout from the saved random states, torch's and megatron-core's way.
    x = torch.ones(64, requires_grad=True)
    for name, run in (
        ("torch", lambda: checkpoint(torch.nn.functional.dropout, x, use_reentrant=True)),
        ("megatron", lambda: _megatron_checkpoint(x)),
    ):
        x.grad = None
        out = run()
        out.sum().backward()
        seen[f"recomputed dropout, {name}"] = torch.equal(out.detach(), x.grad) and 0 < int(out.eq(0).sum()) < 64

    seen["norm and scaling of tensors"] = _norm_and_scaled([torch.tensor([1.0, 2.0]), torch.tensor([[2.0], [4.0]])])

    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream), stream:
        stream.wait_stream(torch.cuda.current_stream())
        event.record(stream)
        stream.record_event().wait()
        stream.wait_event(event)
    event.synchronize()
    stream.synchronize()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_device(0)
    seen["stream and event are done"] = stream.query() and event.query()
    return seen


_TENSOR_LISTS = [
    (f"megatron.core.optimizer.{module}", name)
    for module, names in {
        "clip_grads": ("multi_tensor_applier", "l2_norm_impl", "multi_tensor_scale_impl"),
        "optimizer": ("multi_tensor_applier", "multi_tensor_scale_impl"),
    }.items()
    for name in names
]


def _needs_cuda(*args: Any) -> None:
    raise AssertionError("a kernel for CUDA")


def _norm_and_scaled(tensors: list[torch.Tensor]) -> tuple[float, list[list]]:
    """By megatron-core: the norm of gradients, and those tensors clipped to a norm of 1 and copied."""
    from megatron.core.optimizer import clip_grads, optimizer

    norm = float(clip_grads.get_grad_norm_fp32(tensors, grad_stats_parallel_group=torch.distributed.group.WORLD))
    parameters = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in tensors]
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.grad = tensor.clone()
    clip_grads.clip_grad_by_total_norm_fp32(parameters, 1.0, norm)
    copies = [torch.empty_like(tensor) for tensor in tensors]
    overflow = torch.zeros(1, dtype=torch.int32)
    optimizer._multi_tensor_copy_this_to_that([p.grad for p in parameters], copies, overflow)
    return norm, [copy.tolist() for copy in copies]


def _megatron_checkpoint(x: torch.Tensor) -> torch.Tensor:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        random.model_parallel_cuda_manual_seed(7)
    return random.checkpoint(torch.nn.functional.dropout, False, x)


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run_distributed(observe, 1)[0]


def test_install_is_idempotent(seen):
    assert seen["changed"], "the first call must put every name in place"
    assert seen["idempotent"], "the second must not wrap the wrappers"


def test_nobody_is_told_that_there_is_a_gpu(seen):
    before, after = seen["is_available"]
    assert before == after
    assert seen["current_device"] == torch.device("cpu")


def test_factories_asked_for_cuda_make_cpu_tensors(seen):
    assert seen["devices"] == {name: ["cpu"] * 5 for name in FACTORIES}
    assert {name for name, equal in seen["values"].items() if not equal} == set(), "values or random draws changed"


def test_every_wrapped_factory_is_tested():
    from hacl_megatron.platform.cpu import stand_ins

    assert set(stand_ins._FACTORIES) == set(FACTORIES)


def test_other_devices_stay(seen):
    assert set(seen["metas"].values()) == {"meta"}


def test_a_device_context_still_reaches_the_factories(seen):
    """`torch.device` as a context finds factories by identity: wrapping them hid them from it."""
    expected = {name: "meta" for name in seen["contexts"]}
    assert seen["contexts"] == expected
    assert seen["module on meta"] == {"meta"}
    assert seen["explicit device on meta"] == "cpu"


def test_cuda_methods_return_what_they_got(seen):
    assert seen["cuda() is the tensor"] and seen["cuda() is the module"]


def test_type_strings_are_those_that_megatron_looks_for(seen):
    assert seen["types"] == {
        "torch.float32": "torch.cuda.FloatTensor",
        "torch.bfloat16": "torch.cuda.BFloat16Tensor",
        "torch.float16": "torch.cuda.HalfTensor",
        "torch.int64": "torch.cuda.LongTensor",
    }
    assert "cuda" not in seen["type of meta"]
    assert seen["cast"] == (torch.float64, torch.int32), "with an argument, type() still casts"


@pytest.mark.parametrize("what", ["torch.manual_seed", "cuda.manual_seed", "cuda rng state"])
def test_seeding_reaches_the_one_generator(seen, what):
    """That this process answered at all shows that seeding does not call itself for ever."""
    assert seen[what]


@pytest.mark.parametrize(
    "what", ["fork is reproducible", "fork leaves the outer stream alone", "fork goes on where it stopped"]
)
def test_random_state_tracker(seen, what):
    assert seen[what]


@pytest.mark.parametrize("library", ["torch", "megatron"])
def test_recomputation_draws_the_same_dropout(seen, library):
    assert seen[f"recomputed dropout, {library}"]


def test_norms_and_copies_of_many_tensors_need_no_gpu_library(seen):
    """Transformer Engine's, which megatron-core takes where it is installed, ask the driver of a GPU."""
    norm, copies = seen["norm and scaling of tensors"]
    assert norm == 5
    assert copies[0] == pytest.approx([0.2, 0.4]) and torch.tensor(copies[1]).flatten().tolist() == pytest.approx(
        [0.4, 0.8]
    )


def test_streams_and_events_have_nothing_to_wait_for(seen):
    assert seen["stream and event are done"]


def test_this_process_is_untouched(seen):
    assert not hasattr(torch.zeros, "__wrapped__")
    assert torch.ones(1).type() == "torch.FloatTensor"
