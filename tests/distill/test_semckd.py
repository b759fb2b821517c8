"""SemCKD's published form against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.distill import TeacherAsBase
from tests.distill.layer_cases import FRAMES, B, features, run, start

torch = pytest.importorskip("torch", reason="SemCKD's form is written in torch's layers")
F = torch.nn.functional


def torch_semckd(params, ours, theirs, batch_size):
    """SemCKD's values in torch, from its description; maps [B, F, h, w, C], all frames real."""
    p = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), params["params"]["semckd"])

    def describe(x, name):
        flat = torch.from_numpy(np.array(x)).flatten(1)
        hidden = (flat @ flat.T) @ p[f"{name}_in"]["kernel"] + p[f"{name}_in"]["bias"]
        out = hidden.relu() @ p[f"{name}_out"]["kernel"] + p[f"{name}_out"]["bias"]
        return out / out.norm(dim=1, keepdim=True)

    def image(x):
        return torch.from_numpy(np.array(x)).flatten(0, 1).permute(0, 3, 1, 2)

    queries = torch.stack([describe(x, f"query{n}") for n, x in enumerate(ours)], 1)
    keys = torch.stack([describe(x, f"key{m}") for m, x in enumerate(theirs)], 1)
    weights = torch.softmax(queries @ keys.transpose(1, 2), -1)
    total = torch.zeros(batch_size)
    for n, x in enumerate(ours):
        for m, t in enumerate(theirs):
            q, side = p[f"regressor{n}_{m}"], min(x.shape[2], t.shape[2])
            y = F.adaptive_avg_pool2d(image(x), side)
            for i in range(3):
                y = F.conv2d(y, q[f"conv{i}"]["kernel"].permute(3, 2, 0, 1), padding=int(i == 1))
                if i < 2:
                    norm = q[f"norm{i}"]
                    y = F.batch_norm(y, None, None, norm["scale"], norm["bias"], training=True).relu()
            gap = (y - F.adaptive_avg_pool2d(image(t), side)) ** 2
            total += weights[:, n, m] * gap.reshape(batch_size, -1).mean(1)
    return total.numpy() / len(ours), weights.numpy()


def test_semckd_is_the_published_one():
    student, teacher = features(0, ((4, 3), (2, 5))), features(1, ((3, 2), (2, 4)))
    student = student.replace(frame_mask=jnp.ones((B, FRAMES), bool))
    teacher = teacher.replace(frame_mask=student.frame_mask)
    term = TeacherAsBase(form="semckd", batch_size=B)
    params = start(term, student, teacher)
    values, kept = run(term, params, student, teacher)
    expected, weights = torch_semckd(params, student.layers, teacher.layers, B)
    np.testing.assert_allclose(values, expected, rtol=1e-4)  # two float32 convolution stacks
    np.testing.assert_allclose(kept["weights"], weights, atol=1e-5)
    # A smaller batch than the term was made for still runs, a larger one is refused.
    with pytest.raises(ValueError, match="batch_size is 3, the batch has 4"):
        TeacherAsBase(form="semckd", batch_size=3).apply(params, student, teacher, jnp.ones(B, bool))
