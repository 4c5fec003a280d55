"""The recorded cases: packed without loss, drawn as PyTorch draws, small, and each said in their README."""

import numpy as np
import pytest
import torch
from golden_cases import DATA, decided, drawn, pack, shared, unpack, words_of


def test_tensors_of_all_kinds_come_back_in_order_bit_by_bit():
    given = {
        "b": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        "a": torch.arange(7),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "bytes": torch.ones(2, 2).byte(),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "c": torch.randn(4).t(),
    }
    found, beside = unpack(pack(given, beside={"epoch": 3}))
    assert list(found) == list(given) and beside == {"epoch": 3}
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize("seed", [0, 1000])
def test_drawn_weights_are_those_of_the_initialiser(seed):
    """The same layers, made one after the other, from one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(20, 6), torch.nn.Conv2d(8, 4, 1)]
    tensors = {f"{k}.{name}": p.detach() for k, layer in enumerate(layers) for name, p in layer.named_parameters()}
    places, start = {}, 0
    for k, layer in enumerate(layers):
        bound = float(np.float32(layer.weight[0].numel() ** -0.5))
        for name, parameter in layer.named_parameters():
            places[f"{k}.{name}"] = (start, bound)
            start += parameter.numel()
    words = words_of(seed, start)
    for name, tensor in tensors.items():
        assert np.abs(drawn(words, list(tensor.shape), *places[name]) - tensor.numpy()).max() < 1e-7, name
    assert len(pack(tensors, places, seed)) < 600 < len(pack(tensors))


def test_a_latent_is_decided_where_neither_its_error_nor_a_rounding_changes_its_code():
    codebook = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0]])
    h = torch.tensor([[0.5, 0.0], [1.0, 0.3], [1.1, 0.0], [1 - 1e-7, 0.0], [1e4, 0.0]]).T[None, :, None]
    assert decided(h, codebook)[0, 0].tolist() == [True, False, True, False, True]
    assert decided(h, codebook, 0.2)[0, 0].tolist() == [True, False, False, False, True]
    far = torch.tensor([[1.0, 1e4]]).T[None, :, None] + torch.tensor([1e-4, 0.0])[None, :, None, None]
    assert not decided(far, codebook[:2]).any()  # the difference is lost in the size of both distances


def test_what_the_tests_bring_along_is_small_and_described():
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    readme = shared("README.md").read_text()
    assert all(f"## {path.name}\n" in readme for path in DATA.iterdir() if path.is_dir())
    assert all(f"`{path.name}`" in readme for path in DATA.iterdir() if path.is_file() and path.name != "README.md")
