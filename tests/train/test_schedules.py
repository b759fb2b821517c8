import math

import numpy as np
import pytest

from clipdistill_jax.train.schedules import ScheduleConfig, make_schedule


def values(config, steps, at):
    schedule = make_schedule(config, steps)
    return [float(schedule(step)) for step in at]


@pytest.mark.parametrize(
    ("config", "at", "expected"),
    [
        (0.3, [0, 5, 99], [0.3, 0.3, 0.3]),
        ({"value": 0.4, "warmup_steps": 4}, [0, 1, 3, 4, 9], [0.0, 0.1, 0.3, 0.4, 0.4]),
        ({"kind": "linear", "value": 1.0, "end": 0.5}, [0, 5, 10, 12], [1.0, 0.75, 0.5, 0.5]),
        ({"kind": "linear", "value": 1.0, "warmup_fraction": 0.2}, [1, 2, 6, 10], [0.5, 1.0, 0.5, 0.0]),
        ({"kind": "cosine", "value": 2.0}, [0, 5, 10, 11], [2.0, 1.0, 0.0, 0.0]),
        ({"kind": "cosine", "end": 0.2, "warmup_steps": 2}, [1, 2, 6, 10], [0.5, 1.0, 0.6, 0.2]),
        ({"kind": "steps", "value": 1.0, "boundaries": [3, 6]}, [2, 3, 5, 6, 9], [1.0, 0.1, 0.1, 0.01, 0.01]),
        (
            {"kind": "steps", "value": 8.0, "boundaries": (4, 6), "factor": 0.5, "warmup_steps": 2},
            [1, 2, 3, 4, 5, 6],
            [4.0, 8.0, 8.0, 4.0, 4.0, 2.0],
        ),
    ],
)
def test_values_by_hand(config, at, expected):
    np.testing.assert_allclose(values(config, 10, at), expected, rtol=1e-6, atol=1e-7)


def test_clip4clip_cosine_is_not_rescaled_after_the_warmup():
    def bert_adam(step, steps=100, warmup=0.1):  # CLIP4Clip modules/optimization.py, warmup_cosine
        x = step / steps
        return x / warmup if x < warmup else 0.5 * (1.0 + math.cos(math.pi * x))

    config = ScheduleConfig(kind="cosine", warmup_fraction=0.1, rescale=False)
    at = [0, 3, 9, 10, 11, 50, 99]
    expected = [bert_adam(step) for step in at]
    np.testing.assert_allclose(values(config, 100, at), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "cosin"}, "'cosin' is not one of constant, linear, cosine, steps"),
        ({"warmup_step": 3}, "no field 'warmup_step'; did you mean 'warmup_steps'"),
        ({"warmup_steps": 3, "warmup_fraction": 0.1}, "not both"),
        ({"warmup_steps": 11}, "a warm-up of 11 steps does not fit"),
        ({"kind": "steps", "warmup_steps": 5, "boundaries": (3,)}, "inside the warm-up"),
    ],
)
def test_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(config, 10)
