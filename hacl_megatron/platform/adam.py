"""Adam for machines that have neither Transformer Engine nor Apex, in the form that megatron-core expects of theirs.

megatron-core's distributed optimiser stores its step count per parameter group, as the fused Adams of those two
libraries do; it cannot load a checkpoint that was made around `torch.optim.AdamW`, and torch's AdamW refuses groups
without parameters, which a pipeline stage with nothing to train has. So this class computes what
`torch.optim.AdamW` (or Adam) computes and keeps `step` in the group.
"""

import torch


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW (`adam_w_mode`) or Adam with L2, bias-corrected; signature of `apex.optimizers.FusedAdam`.

    State per parameter: `exp_avg`, `exp_avg_sq`; per group: `step`.
    """

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0,
        **fused_only,
    ) -> None:  # fmt: skip
        assert bias_correction, "Adam without bias correction is not implemented"
        asked = sorted(name for name, value in fused_only.items() if value)  # megatron-core 0.19 passes some as False
        if asked:
            raise ValueError(f"optimizer: {', '.join(asked)} needs Transformer Engine's or Apex's Adam; install one")
        self.adam_w_mode = adam_w_mode
        super().__init__(params, dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            correction1 = 1 - beta1 ** group["step"]
            correction2 = 1 - beta2 ** group["step"]
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            means = [self.state[p]["exp_avg"] for p in params]
            squares = [self.state[p]["exp_avg_sq"] for p in params]
            if group["weight_decay"]:
                if self.adam_w_mode:
                    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                else:
                    grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            # m / (sqrt(v / c) + eps) as sqrt(c) m / (sqrt(v) + sqrt(c) eps): one pass over memory less.
            denominators = torch._foreach_sqrt(squares)
            torch._foreach_add_(denominators, group["eps"] * correction2**0.5)
            torch._foreach_addcdiv_(params, means, denominators, -group["lr"] * correction2**0.5 / correction1)
        return None


def use_group_step_adam() -> None:
    """Make megatron-core build `GroupStepAdam` where it would fall back to torch's optimisers."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = GroupStepAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    # These two say "the step count lives in the group", which is all that the loading code asks them.
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
