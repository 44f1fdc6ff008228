import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clean_transformer.config import Config
from clean_transformer.hooks import HookPoint, observed
from clean_transformer.modules.mlp import MLP

REGISTRATIONS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


def test_a_hook_point_gives_back_the_very_same_tensor():
    activation = torch.ones(2, requires_grad=True)
    assert HookPoint()(activation) is activation


def test_a_hook_point_has_no_parameters_and_no_name_of_its_own():
    assert not HookPoint().state_dict()
    assert HookPoint().name is None


def test_a_plain_forward_hook_sees_and_replaces():
    point, seen = HookPoint(), []
    point.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    assert point(torch.tensor(3.0)) == 6
    assert seen == [torch.tensor(3.0)]


@pytest.mark.parametrize("register", REGISTRATIONS)
def test_observed_from_registration_to_removal(register: str):
    point, other = HookPoint(), HookPoint()
    assert not observed(point, other)
    handle = getattr(point, register)(lambda *_: None)
    assert observed(point)
    assert observed(other, point)
    assert not observed(other)
    handle.remove()
    assert not observed(point)


def test_nothing_is_observed_among_no_points():
    assert not observed()


def test_a_hook_on_the_parent_does_not_observe_its_points():
    parent = nn.Sequential(HookPoint())
    parent.register_forward_hook(lambda *_: None)
    assert not observed(parent[0])


def test_activations_are_kept_on_a_device_whose_memory_has_no_address():
    """On xla, as here on fake tensors, a tensor's memory has no address that could be compared."""
    cfg = Config(n_layers=1, n_heads=2, d_model=8, d_head=4, d_mlp=16, d_vocab=10, n_ctx=4)
    with FakeTensorMode():
        _, cache = MLP(cfg).run_with_cache(torch.zeros(1, 4, 8))
        assert cache["hook_post"].shape == (1, 4, 16)
