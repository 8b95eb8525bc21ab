"""Uploads where nothing is to be copied: the same values, the given device. With a GPU: tests/gpu/test_batch.py."""

import pytest
import torch

from goku_kernels import Packing
from goku_kernels.upload import upload, upload_rows, upload_values


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_on_the_host_nothing_is_copied_twice(device):
    x = torch.arange(6, dtype=torch.int32).view(3, 2)
    assert upload(x, device) is x
    rows = upload_rows([x, x[:0], x[1:]], device)
    assert rows.dtype == torch.int32
    assert torch.equal(rows, torch.tensor([[0, 1], [2, 3], [4, 5], [2, 3], [4, 5]]))
    rows[0, 0] = 7
    assert x[0, 0] == 0


def test_rows_of_several_dtypes_are_refused():
    """On a GPU the first one's would be everybody's, and round."""
    x = torch.ones(2, 3)
    with pytest.raises(
        ValueError, match=r"dtypes \['torch.bfloat16', 'torch.float32'\]; allowed: one"
    ):
        upload_rows([x.bfloat16(), x], "cpu")


def test_other_devices_get_an_ordinary_copy():
    x = torch.ones(3, 2, dtype=torch.float64)
    for found in (upload(x, "meta"), upload_rows([x], torch.device("meta"))):
        assert (found.device.type, found.shape, found.dtype) == ("meta", (3, 2), torch.float64)


def test_a_default_device_decides_only_where_none_is_given():
    with torch.device("meta"):
        assert upload_values([1, 2], torch.int32, None).device.type == "meta"
        found = upload_values([[1, 2], [3, 4]], torch.int64, "cpu")
        packing = Packing.from_grids([(1, 2, 3), (1, 1, 2)], device="cpu")
        assert Packing.from_lengths([3]).cu_seqlens.device.type == "meta"
        ids = packing.segment_ids()
    assert found.tolist() == [[1, 2], [3, 4]]
    assert packing.cu_seqlens.tolist() == [0, 6, 8]
    assert packing.grid_sizes.tolist() == [[1, 2, 3], [1, 1, 2]]
    assert ids.tolist() == [0] * 6 + [1] * 2
