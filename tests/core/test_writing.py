"""How weight files are written: one tensor at a time, as the format has it."""

import weakref

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from cat_diffusion.cat_core import weights


class Copies(TorchDispatchMode):
    """Counts the bytes of bf16 tensors that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.alive = 0
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            size = result.untyped_storage().nbytes()
            self.alive += size
            self.most = max(self.most, self.alive)
            weakref.finalize(result.untyped_storage(), self.forget, size)
        return result

    def forget(self, size):
        self.alive -= size


def test_one_converted_tensor_is_in_memory_at_a_time(tmp_path):
    tensors = {str(number): torch.rand(1000, 10 * number) for number in range(1, 20)}
    with Copies() as copies:
        weights.save(tmp_path / "x.safetensors", tensors, {}, torch.bfloat16)
    largest = 2 * tensors["19"].numel()
    assert largest <= copies.most <= 2 * largest  # the next is made before the last one goes
    whole = sum(2 * tensor.numel() for tensor in tensors.values())
    assert copies.most < whole / 4


def test_every_type_and_shape_is_read_back(tmp_path):
    tensors = {
        "a": torch.rand(3, 5).t(),
        "b": torch.rand(7).to(torch.bfloat16),
        "half": torch.rand(1).half(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "indices": torch.arange(5),
        "flags": torch.tensor([True, False, True]),
        "tied": torch.ones(4),
        "\u00e4": torch.ones(2, dtype=torch.int8),
    }
    tensors["tied too"] = tensors["tied"]
    weights.save(tmp_path / "x.safetensors", tensors, {"license": "MIT", "by": "\u00e4"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)
        assert found[key].data_ptr() % tensor.itemsize == 0
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"license": "MIT", "by": "\u00e4"}
