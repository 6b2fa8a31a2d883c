"""Whether Ray Train is started again, by which error it ended with."""

from __future__ import annotations

import pytest
import ray.train
import ray.train.torch

from tpaw.pipeline.ray_group import run_group


@pytest.fixture
def fits(monkeypatch):
    """Let Ray Train end with these errors, one after another; give back what is left of them."""

    def ending(*errors):
        left = [*errors]

        class Trainer:
            def __init__(self, *args, **kwargs):
                pass

            def fit(self):
                if error := left.pop(0):
                    raise error

        monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
        return left

    return ending


LOST = ray.train.ControllerError(RuntimeError("a helper of Ray Train died with its machine"))
FAILED = ray.train.WorkerGroupError("a process failed", {0: RuntimeError("a bug")})


def test_ray_train_that_lost_a_helper_is_started_again(fits, tmp_path):
    left = fits(LOST, LOST, None, FAILED)
    run_group({}, 2, False, 2, str(tmp_path))
    assert left == [FAILED]  # nothing follows a training that ended well


@pytest.mark.parametrize(
    ("errors", "retries", "tries"), [([LOST] * 5, 2, 3), ([LOST] * 5, 0, 1), ([FAILED] * 5, 2, 1)]
)
def test_it_is_not_started_too_often_or_after_errors_of_processes(
    fits, tmp_path, errors, retries, tries
):
    left = fits(*errors)
    with pytest.raises(type(errors[0])):
        run_group({}, 2, False, retries, str(tmp_path))
    assert len(left) == 5 - tries
