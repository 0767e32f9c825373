"""GroupStepAdam against torch's own optimisers."""

import copy

import pytest
import torch

from hacl_megatron.platform.adam import GroupStepAdam

SHAPES = ((7, 5), (5,), (3, 2, 4), (1,))
STEPS = 60
# fp32 updates of 1e-2 in a different order of operations, over 60 steps on parameters of order 1
CLOSE = dict(rtol=2e-5, atol=2e-6)


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params: list[torch.nn.Parameter], weight_decay: float) -> list[dict]:
    return [
        {"params": params[:2], "lr": 1e-2, "weight_decay": weight_decay},
        {"params": params[2:], "lr": 3e-3, "weight_decay": 0.0},
    ]


def give_gradients(params: list[torch.nn.Parameter], step: int, *, without: tuple[int, ...] = ()) -> None:
    """Gradients whose size differs by orders of magnitude between elements and steps; some exactly zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    for index, parameter in enumerate(params):
        noise = torch.randn(parameter.shape, generator=generator)
        sizes = 10 ** torch.empty(parameter.shape).uniform_(-5, 1, generator=generator)
        parameter.grad = None if index in without else torch.where(noise > 1.5, 0.0, noise * sizes)


def assert_equal(ours, theirs) -> None:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a.data, b.data, **CLOSE, msg=lambda text, i=index: f"parameter {i}: {text}")


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [True, False])
def test_many_steps_equal_torch(decoupled, weight_decay, betas):
    ours, theirs = parameters(), parameters()
    adam = GroupStepAdam(groups(ours, weight_decay), betas=betas, eps=1e-8, adam_w_mode=decoupled)
    reference = (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups(theirs, weight_decay), betas=betas)
    for step in range(STEPS):
        for optimizer, params in ((adam, ours), (reference, theirs)):
            for group in optimizer.param_groups:  # a schedule changes the rate between steps
                group["lr"] *= 0.98
            give_gradients(params, step)
            optimizer.step()
    assert_equal(ours, theirs)
    assert any((a - b).abs().max() > 0.05 for a, b in zip(ours, parameters(), strict=True))


def test_parameters_are_updated_in_place():
    ours = parameters()
    pointers = [parameter.data_ptr() for parameter in ours]
    adam = GroupStepAdam(groups(ours, 0.1))
    for step in range(2):
        give_gradients(ours, step)
        gradients = [parameter.grad.clone() for parameter in ours]
        adam.step()
        for parameter, gradient in zip(ours, gradients, strict=True):
            assert torch.equal(parameter.grad, gradient)
    assert [parameter.data_ptr() for parameter in ours] == pointers


def test_a_group_without_parameters_keeps_its_count():
    ours = parameters()
    adam = GroupStepAdam([{"params": []}, {"params": ours}], lr=1e-2)
    for step in range(3):
        give_gradients(ours, step)
        adam.step()
    assert [group["step"] for group in adam.param_groups] == [3, 3]
    theirs = parameters()
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.0)
    for step in range(3):
        give_gradients(theirs, step)
        reference.step()
    assert_equal(ours, theirs)


def test_a_parameter_that_never_has_a_gradient_stays_and_gets_no_state():
    ours, theirs = parameters(), parameters()
    adam, reference = GroupStepAdam(groups(ours, 0.1)), torch.optim.AdamW(groups(theirs, 0.1))
    for step in range(5):
        for optimizer, params in ((adam, ours), (reference, theirs)):
            give_gradients(params, step, without=(1,))
            optimizer.step()
    assert_equal(ours, theirs)
    assert torch.equal(ours[1], parameters()[1])
    assert ours[1] not in adam.state


def test_state_dict_resumes_exactly():
    def run(optimizer, params, steps) -> None:
        for step in steps:
            give_gradients(params, step)
            optimizer.step()

    whole = parameters()
    run(GroupStepAdam(groups(whole, 0.1)), whole, range(10))

    first = parameters()
    adam = GroupStepAdam(groups(first, 0.1))
    run(adam, first, range(4))
    saved = copy.deepcopy(adam.state_dict())
    assert [group["step"] for group in saved["param_groups"]] == [4, 4]
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in saved["state"].values())

    second = [torch.nn.Parameter(parameter.detach().clone()) for parameter in first]
    resumed = GroupStepAdam(groups(second, 0.1))
    resumed.load_state_dict(saved)
    run(resumed, second, range(4, 10))
    for a, b in zip(second, whole, strict=True):
        assert torch.equal(a, b)


def test_moments_are_those_of_torch():
    ours, theirs = parameters(), parameters()
    adam, reference = GroupStepAdam(groups(ours, 0.1)), torch.optim.AdamW(groups(theirs, 0.1))
    for step in range(10):
        for optimizer, params in ((adam, ours), (reference, theirs)):
            give_gradients(params, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(adam.state[a][name], reference.state[b][name], rtol=1e-5, atol=1e-9)
