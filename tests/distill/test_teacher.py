"""The fingerprint tells one teacher from another."""

import numpy as np

from clipdistill_jax.distill.teacher import fingerprint


def test_equal_variables_have_equal_fingerprints_in_any_order():
    a, b = np.arange(6, dtype=np.float32), np.ones((2, 3), np.float32)
    assert fingerprint({"x": {"a": a}, "y": b}) == fingerprint({"y": b.copy(), "x": {"a": a.copy()}})


def test_any_difference_shows():
    a = np.arange(6, dtype=np.float32)
    changed = a.copy()
    changed[3] = np.nextafter(changed[3], 9)
    variants = [{"a": a}, {"b": a}, {"a": changed}, {"a": a.reshape(2, 3)}, {"a": a.astype(np.float64)}]
    assert len({fingerprint(v) for v in variants}) == len(variants)
