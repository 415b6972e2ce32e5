"""The loss terms against numbers worked by hand."""

from math import log

import pytest
import torch
from torch import Tensor

from depo_gateway.estimator import losses

NAN = float("nan")


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def test_cross_entropy_is_the_mean_bce_of_each_pool_summed() -> None:
    z = torch.tensor([[0.0, 0.0], [0.0, log(3)]])
    t = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    # pool 0: (log 2 + log 2) / 2; pool 1: (log 2 + log(4/3)) / 2
    expected = log(2) + (log(2) + log(4 / 3)) / 2
    assert losses.cross_entropy(z, t, torch.ones(2)).item() == pytest.approx(expected, rel=1e-6)


def test_a_missing_label_is_masked_and_gets_no_gradient() -> None:
    z = torch.zeros(3, 1, requires_grad=True)
    loss = losses.cross_entropy(z, column(1.0, NAN, 0.0), torch.ones(3))
    loss.backward()
    assert loss.item() == pytest.approx(log(2))
    assert z.grad is not None
    assert z.grad.flatten().tolist() == pytest.approx([-0.25, 0.0, 0.25])


def test_a_pool_without_any_label_adds_nothing() -> None:
    z = torch.zeros(2, 2)
    t = torch.tensor([[1.0, NAN], [0.0, NAN]])
    for term in (losses.cross_entropy, losses.ranking, losses.gain):
        whole, first = term(z, t, torch.ones(2)), term(z[:, :1], t[:, :1], torch.ones(2))
        assert whole.item() == pytest.approx(first.item())
    assert losses.gain(z, t, torch.ones(2)).item() == 0.0


def test_weights_weigh() -> None:
    z, t = column(0.0, log(3)), column(1.0, 1.0)
    expected = (3 * log(2) + log(4 / 3)) / 4
    assert losses.cross_entropy(z, t, torch.tensor([3.0, 1.0])).item() == pytest.approx(expected, rel=1e-6)


def test_cross_entropy_takes_fractions_as_targets() -> None:
    u, d = column(0.0, log(4)), column(0.3, 0.8)
    entropy = -(0.8 * log(0.8) + 0.2 * log(0.2))
    assert losses.cross_entropy(u, d, torch.ones(2)).item() == pytest.approx((log(2) + entropy) / 2, rel=1e-6)


def test_ranking_is_thrice_the_mean_hinge_over_pairs() -> None:
    # pairs (0 over 1): 0.5 - (1 - 0.8) = 0.3; (0 over 2): 0.5 - (1 + 1) < 0 -> 0; (1 over 2): 0.5 - 1.8 < 0 -> 0
    loss = losses.ranking(column(1.0, 0.8, -1.0), column(1.0, 0.5, 0.0), torch.ones(3))
    assert loss.item() == pytest.approx(3.0 * 0.3 / 3, rel=1e-5)


def test_ranking_leaves_out_near_ties_and_missing_labels() -> None:
    z = column(0.0, 1.0, 2.0)
    assert losses.ranking(z, column(0.54, 0.5, 0.5), torch.ones(3)).item() == 0.0
    assert losses.ranking(z, column(1.0, NAN, NAN), torch.ones(3)).item() == 0.0
    assert losses.ranking(z, column(1.0, 0.0, NAN), torch.ones(3)).item() == pytest.approx(3.0 * 1.5)


def test_gain_is_the_squared_error_of_quality_differences() -> None:
    z = torch.tensor([[0.0, log(3)], [0.0, 0.0], [5.0, 5.0]])
    t = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, NAN]])
    # predicted differences 0.25 and 0, observed 1 and -1; the third has no difference
    assert losses.gain(z, t, torch.ones(3)).item() == pytest.approx((0.75**2 + 1) / 2, rel=1e-5)
    assert losses.gain(z[:, :1], t[:, :1], torch.ones(3)).item() == 0.0
