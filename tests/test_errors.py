"""Errors in one line: what came from other places is cut down to what it says."""

import pytest
import torch

from acmix.data.loading import make_loader
from acmix.errors import one_line


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_while_loading_is_told_without_the_traceback_of_the_worker(workers):
    bad = [(torch.full((1, 2, 2), torch.nan), 0)]
    with pytest.raises(ValueError, match="finite") as error:
        list(make_loader(bad, batch_size=1, num_workers=workers, train=True))
    expected = "data: expected finite pixels, got NaN or infinity in image 0"
    assert one_line(error.value) == expected


def test_a_full_disk_is_named_with_the_file():
    assert one_line(OSError(28, "No space left on device", "a/b")) == "No space left on device: a/b"
