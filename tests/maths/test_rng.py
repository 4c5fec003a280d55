"""Random numbers are functions of their path."""

import numpy as np
import pytest
import torch

from ldmcli.maths import rng


def test_a_key_is_the_same_in_every_process_and_version():
    # hash() of a string differs in each process
    assert rng.key(0) == 2631537505891389924
    assert rng.key(7, "noise", 3) == 1372190536921339175


def test_keys_fit_63_bits_and_fill_them():
    keys = [rng.key(seed, "x") for seed in range(2000)]
    assert all(0 <= key < 2**63 for key in keys)
    assert max(keys) > 0.99 * 2**63 and min(keys) < 0.01 * 2**63
    assert len(set(keys)) == 2000


@pytest.mark.parametrize(
    "a, b",
    [
        ((0, "a"), (1, "a")),
        ((0, "a"), (0, "b")),
        ((0, 1), (0, "1")),
        ((0, "ab", "c"), (0, "a", "bc")),
        ((0, 1, 2), (0, 2, 1)),
        ((0, 12), (0, 1, 2)),
        ((0,), (0, 0)),
        ((0, "a"), (0, "a", "")),
        ((0, 1), (0, -1)),
    ],
)
def test_paths_that_differ_in_a_part_a_type_or_an_order_have_different_keys(a, b):
    assert rng.key(*a) != rng.key(*b)


def test_numpy_integers_count_as_integers_and_floats_are_refused():
    assert rng.key(np.int64(3), np.uint8(4)) == rng.key(3, 4)
    with pytest.raises(TypeError):
        rng.key(0, 1.0)


def test_a_generator_repeats_its_numbers_and_leaves_the_global_state_alone():
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = torch.rand(5, generator=rng.generator(3, "drop", 1))
    assert torch.equal(first, torch.rand(5, generator=rng.generator(3, "drop", 1)))
    assert not torch.equal(first, torch.rand(5, generator=rng.generator(3, "drop", 2)))
    rng.normal(0, [1, 2], (3,))
    rng.permutation(0, 0, 9)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_numpy).all()


def test_sample_k_has_the_same_noise_alone_and_in_any_batch():
    together = rng.normal(5, range(8), (2, 3), "noise", 11)
    assert torch.equal(rng.normal(5, [6], (2, 3), "noise", 11)[0], together[6])
    assert torch.equal(rng.normal(5, [6, 0, 6], (2, 3), "noise", 11), together[[6, 0, 6]])


def test_noise_differs_between_samples_seeds_and_paths():
    base = rng.normal(5, [0], (4,), "noise", 1)
    others = [
        rng.normal(6, [0], (4,), "noise", 1),
        rng.normal(5, [1], (4,), "noise", 1),
        rng.normal(5, [0], (4,), "noise", 2),
        rng.normal(5, [0], (4,), "start", 1),
    ]
    assert all(not torch.isclose(base, other).any() for other in others)


def test_noise_keeps_its_numbers_between_versions():
    first = rng.normal(0, [0], (3,), "test")[0].tolist()
    assert first == pytest.approx([0.1214609, 0.2819074, 1.2408862], abs=1e-6)


def test_noise_is_float32_of_the_shape_asked_for():
    for shape in [(), (5,), (2, 3, 4)]:
        noise = rng.normal(0, [3, 4], shape, device="cpu")
        assert noise.shape == (2, *shape) and noise.dtype == torch.float32
    assert rng.normal(0, [], (2, 3)).shape == (0, 2, 3)


def test_noise_is_standard_normal_and_uncorrelated_between_samples():
    noise = rng.normal(1, range(400), (600,)).double()
    n = noise.numel()
    assert abs(noise.mean()) < 4 / n**0.5
    assert abs(noise.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / n) ** 0.5
    correlation = np.corrcoef(noise.numpy()) - np.eye(400)
    assert abs(correlation).max() < 6 / 600**0.5
    assert abs(correlation.mean()) < 5 / (400 * 600**0.5)


def test_uniform_numbers_belong_to_their_sample_and_fill_the_unit_interval():
    together = rng.uniform(2, range(4000), "t", 9)
    assert together.dtype == torch.float64 and together.shape == (4000,)
    assert torch.equal(rng.uniform(2, [17, 3], "t", 9), together[[17, 3]])
    assert not torch.isclose(together[:50], rng.uniform(2, range(50), "t", 10)).any()
    assert 0 <= together.min() and together.max() < 1
    counts = torch.histc(together, 10, 0, 1)
    assert (counts - 400).abs().max() < 5 * 360**0.5


@pytest.mark.parametrize("n", [1, 2, 57])
def test_a_permutation_holds_every_row_once(n):
    order = rng.permutation(4, 0, n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


def test_a_permutation_repeats_itself_and_differs_between_epochs_and_seeds():
    order = rng.permutation(4, 1, 50).tolist()
    assert order == rng.permutation(4, 1, 50).tolist()
    assert order != rng.permutation(4, 2, 50).tolist()
    assert order != rng.permutation(5, 1, 50).tolist()


def test_every_row_comes_first_about_equally_often():
    first = np.bincount([rng.permutation(0, epoch, 5)[0] for epoch in range(1000)], minlength=5)
    assert abs(first - 200).max() < 5 * 160**0.5
