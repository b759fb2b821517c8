"""Regions of an image: joined, scaled, thinned out, with the whole image before them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill_jax.data.formats import FormatError
from clipdistill_jax.data.regions import Regions, join, make_regions, most_confident, prepend_image
from clipdistill_jax.data.regions.geometry import uniter_locations
from tests.data.regions.region_cases import SIZE, arrays


def some(n: int, *, seed: int = 0, size=SIZE, conf: bool = True) -> Regions:
    content = arrays(n, seed=seed)
    extra = {"conf": content["conf"], "class_probs": content["soft_labels"]} if conf else {}
    return make_regions(content["features"], content["boxes"], size, "x", width=8, **extra)


def test_ground_truth_first():
    truth, detected = some(3, seed=1), some(4, seed=2)
    found = join(truth, detected, "image", num_objects=3)
    assert found.ground_truth.tolist() == [True] * 3 + [False] * 4
    for name in ("features", "boxes", "conf", "class_probs"):
        np.testing.assert_array_equal(getattr(found, name)[:3], getattr(truth, name))
        np.testing.assert_array_equal(getattr(found, name)[3:], getattr(detected, name))
    assert join(some(2, conf=False), detected, "image").conf is None
    with pytest.raises(FormatError, match="image: 3 ground-truth regions, but 5 objects"):
        join(truth, detected, "image", num_objects=5)
    with pytest.raises(FormatError, match=r"\(640.0, 480.0\).*\(1.0, 1.0\).*scaled"):
        join(truth, detected.scaled((1.0, 1.0)), "image")
    narrow = make_regions(np.ones((1, 5)), np.ones((1, 4)), SIZE, "x", width=None)
    with pytest.raises(FormatError, match="'features' is 8 wide in the ground truth, 5 in the detections"):
        join(truth, narrow, "image")


def test_scaling_there_and_back():
    found = some(4)
    back = found.scaled((1.0, 1.0)).scaled(SIZE)
    np.testing.assert_allclose(back.boxes, found.boxes, rtol=3e-7)  # two roundings of 2**-24
    assert back.size == SIZE


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1, width=16), min_size=1, max_size=30),
    st.integers(1, 8),
    st.integers(8, 20),
)
def test_most_confident(conf, low, high):
    n = len(conf)
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1))
    features = np.arange(n, dtype=np.float32)[:, None]
    regions = make_regions(features, boxes, (1.0, 1.0), "x", width=1, conf=np.array(conf, np.float32))
    found = most_confident(regions, threshold=0.2, min_count=low, max_count=high)
    above = sum(c > np.float32(0.2) for c in np.array(conf, np.float32))
    assert len(found) == min(n, max(low, min(above, high)))
    best_first = sorted(range(n), key=lambda i: (-conf[i], i))
    assert found.features[:, 0].tolist() == best_first[: len(found)]


def test_confidence_is_needed():
    with pytest.raises(ValueError, match="without confidences"):
        most_confident(some(3, conf=False))


def test_whole_image_as_region_0():
    found = prepend_image(some(4))
    assert len(found) == 5 and not found.ground_truth.any()
    assert found.boxes[0].tolist() == [0, 0, 640, 480]
    np.testing.assert_allclose(found.features[0], arrays(4)["features"].mean(0), rtol=1e-6)
    assert found.conf[0] == 1 and not found.class_probs[0].any()
    np.testing.assert_array_equal(found.boxes[1:], some(4).boxes)
    whole = np.arange(8, dtype=np.float32)
    given = make_regions(*(arrays(4)[k] for k in ("features", "boxes")), SIZE, "x", width=8, image=whole)
    found = prepend_image(given.scaled((1.0, 1.0)))
    np.testing.assert_array_equal(found.features[0], whole)
    np.testing.assert_array_equal(uniter_locations(found.boxes, found.size)[0], [0, 0, 1, 1, 1, 1, 1])
    truth = join(some(2), some(3), "image")
    assert prepend_image(truth).ground_truth.tolist() == [False, True, True, False, False, False]
