"""Transformer Engine's own modules on the CPU: all of them as it is, but for the kernels, which torch stands in for.

So what is tested is what this project and megatron-core give the modules (arguments, groups, shapes, names in
checkpoints, hooks), and what the modules make of it; not NVIDIA's kernels, which need a GPU (`tests/gpu`).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.nn import functional as F


def _built_as_with_a_gpu(build: Callable) -> Callable:
    """A constructor that asserts a CUDA device; megatron-core has it put its parameters on the CPU all the same."""

    @functools.wraps(build)
    def built(self, *arguments, **keywords) -> None:
        with mock.patch("torch.cuda.is_available", return_value=True):
            build(self, *arguments, **keywords)

    return built


def _norm(module, x: Tensor) -> Tensor:
    """The norm inside of `LayerNormLinear`."""
    assert not module.zero_centered_gamma
    if module.normalization == "RMSNorm":
        return F.rms_norm(x, x.shape[-1:], module.layer_norm_weight, module.eps)
    return F.layer_norm(x, x.shape[-1:], module.layer_norm_weight, module.layer_norm_bias, module.eps)


class _Product(torch.autograd.Function):
    """x W^T, whose gradient of W goes where Transformer Engine puts it.

    With `fuse_wgrad_accumulation` the product adds it to DDP's buffer itself, or overwrites what is there in the first
    micro-batch, and hands on a tensor of no meaning.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, fused: bool, is_first_microbatch: bool | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fused, ctx.is_first_microbatch = fused, is_first_microbatch
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
            if ctx.fused:
                if ctx.is_first_microbatch:
                    weight.main_grad.zero_()
                weight.main_grad.add_(of_weight)
                weight.grad_added_to_main_grad = True
                of_weight = torch.full_like(weight, torch.nan)
        return gradient @ weight, of_weight, None, None


def _linear(module, x: Tensor, is_first_microbatch: bool | None) -> Tensor | tuple[Tensor, Tensor]:
    """`Linear.forward` and the second half of `LayerNormLinear.forward`, with the exchange between the ranks.

    Products are not FP8's where it is on; but the module keeps scales, which a step changes, as delayed scaling does.
    """
    module.init_fp8_metadata()
    if module.fp8 and torch.is_grad_enabled():
        module.fp8_meta["scaling_fwd"].scale.add_(1)
    assert x.dtype == module.weight.dtype, "the modules refuse this"
    group, column = module.tp_group, module.parallel_mode == "column"
    bias = module.bias if module.use_bias and module.bias.numel() else None
    if column and module.sequence_parallel:
        x = tensor_parallel.gather_from_sequence_parallel_region(x, group=group)
    elif column:
        x = tensor_parallel.copy_to_tensor_model_parallel_region(x, group=group)
    y = _Product.apply(x, module.weight, module.fuse_wgrad_accumulation, is_first_microbatch)
    if column and bias is not None and not module.return_bias:
        y = y + bias
    if not column:
        assert module.parallel_mode == "row"
        if module.sequence_parallel:
            y = tensor_parallel.reduce_scatter_to_sequence_parallel_region(y, group=group)
        else:
            y = tensor_parallel.reduce_from_tensor_model_parallel_region(y, group=group)
        if bias is not None and not module.return_bias:
            y = y + bias
    return (y, bias) if module.return_bias else y


@contextmanager
def te_on_host() -> Iterator[None]:
    """Inside, models are built of Transformer Engine's modules, as on a GPU that has it."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch import quantization

    from hacl_megatron.assemble import module
    from hacl_megatron.model import transformer_configs
    from hacl_megatron.platform import specs

    def rms_norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)

    def layer_norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def norm_and_linear(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return _linear(self, _norm(self, x), is_first_microbatch)

    replaced = [
        (te.Linear, "__init__", _built_as_with_a_gpu(te.Linear.__init__)),
        (te.LayerNormLinear, "__init__", _built_as_with_a_gpu(te.LayerNormLinear.__init__)),
        (te.Linear, "forward", lambda self, x, is_first_microbatch=None: _linear(self, x, is_first_microbatch)),
        (te.LayerNormLinear, "forward", norm_and_linear),
        (te.RMSNorm, "forward", rms_norm),
        (te.LayerNorm, "forward", layer_norm),
        (quantization.FP8GlobalStateManager, "is_fp8_available", lambda: (True, "")),
        (quantization, "get_device_compute_capability", lambda: (9, 0)),
        *(
            (user, "layer_library", lambda *_, **__: "transformer_engine")
            for user in (specs, module, transformer_configs)
        ),
    ]
    with ExitStack() as stack:
        for each in replaced:
            stack.enter_context(mock.patch.object(*each))
        yield
