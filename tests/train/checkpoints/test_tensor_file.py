import hashlib

import pytest
import torch
from safetensors.torch import load_file

from train.checkpoints.tensor_file import Spec, specs_of, write_tensors

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).view(3, 4),
    "half": torch.tensor([1.5, -2.0, 3.25], dtype=torch.bfloat16),
    "flag": torch.tensor([True, False, True]),
    "count": torch.tensor(7),
    "nothing": torch.empty(0, 5),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def test_the_library_reads_what_was_written(tmp_path):
    path = tmp_path / "file.safetensors"
    written = write_tensors(path, specs_of(TENSORS), TENSORS.__getitem__)
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert written == hashlib.sha256(path.read_bytes()).hexdigest()


def test_views_of_one_storage_are_written_each_for_itself(tmp_path):
    whole = torch.arange(20.0).view(4, 5)
    parts = {"column": whole[:, 2], "transposed": whole.t(), "row": whole[1]}
    write_tensors(tmp_path / "file", specs_of(parts), parts.__getitem__)
    read = load_file(tmp_path / "file")
    assert all(torch.equal(read[name], part) for name, part in parts.items())


def test_one_tensor_is_asked_for_at_a_time_and_must_be_as_announced(tmp_path):
    specs = {"a": Spec(torch.float32, (2,)), "b": Spec(torch.float32, (3,))}
    asked = []

    def get(name):
        asked.append(name)
        return torch.zeros(2)

    with pytest.raises(ValueError, match=r"b is torch.float32 \[2\], announced .* \[3\]"):
        write_tensors(tmp_path / "file", specs, get)
    assert asked == ["a", "b"]
