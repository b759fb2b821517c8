"""Batch shapes and the order of items: padding, every item, full batches, any start, hosts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdistill_jax.data.questions.buckets import (
    BUCKETS,
    QuestionPlan,
    Shape,
    choose_shapes,
    evaluation_rows,
    padding,
    shape_of,
)


def vcr_like(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a question with each of four answers, 8 to 55; the image with its regions, 12 to 101."""
    rng = np.random.default_rng(seed)
    question = np.clip(rng.normal(9, 3, (count, 1)), 4, 20)
    tokens = 3 + question + np.clip(rng.gamma(4, 2.6, (count, 4)), 2, 34)  # an answer's length is its own
    regions = 2 + rng.poisson(6, count) + rng.lognormal(np.log(33), 0.45, count)
    found = np.clip(np.round(tokens), 8, 55), np.clip(np.round(regions), 12, 101)
    return tuple(lengths.astype(np.int64) for lengths in found)


def test_padding_of_vcr_like_lengths():
    """Of all four sequences of a question: 19% in the shapes that are allowed, against 56% in one shape.

    12% is the shapes' and 7% that of choices shorter than the longest of their question, which more shapes do
    not save: 40 of them leave 14%.
    """
    tokens, regions = vcr_like(20_000)
    lengths = np.stack([tokens.max(1), regions], 1)
    shapes = choose_shapes(lengths, BUCKETS)
    assert padding(tokens, regions, choose_shapes(lengths, 1)) > 0.5
    whole, longest = padding(tokens, regions, shapes), padding(lengths[:, :1], regions, shapes)
    assert longest < 0.13 and whole - longest < 0.07
    assert padding(tokens, regions, choose_shapes(lengths, 40)) < 0.15
    plan = QuestionPlan(shape_of(lengths, shapes), shapes, batch_size=64, seed=3)
    seen, real, padded = set(), 0, 0
    for step in range(2 * len(lengths) // 64):  # what does not fill a batch goes to a larger shape
        shape, items = plan.rows(step)
        assert (lengths[items] <= shapes[shape]).all()
        seen.add(shape)
        real += (tokens[items] + regions[items, None]).sum()
        padded += 4 * len(items) * sum(shapes[shape])
    assert len(seen) <= BUCKETS and whole <= 1 - real / padded < 0.2
    # Lengths that nobody chose shapes for have as little.
    tokens, regions = (np.minimum(x, most) for x, most in zip(vcr_like(20_000, 1), shapes[-1], strict=True))
    assert padding(tokens, regions, shapes) < 0.2


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30), st.integers(1, 4))
def test_shapes_hold_every_item_and_do_not_depend_on_the_order(lengths, most):
    lengths = np.array(lengths)
    shapes = choose_shapes(lengths, most)
    assert len(set(shapes)) == len(shapes) <= most
    assert shapes[-1] == tuple(lengths.max(0)) and list(map(sum, shapes)) == sorted(map(sum, shapes))
    assert choose_shapes(lengths[::-1], most) == shapes
    table = np.array(shapes)
    for length, shape in zip(lengths, shape_of(lengths, shapes), strict=True):
        sizes = [sum(s) for s in table.tolist() if length[0] <= s[0] and length[1] <= s[1]]
        assert sum(shapes[shape]) == min(sizes)
    if most == 2:  # the other shape by trying all
        largest, one = tuple(lengths.max(0)), (lengths[:, :1], lengths[:, 1])  # one choice an item
        tried = [
            padding(*one, sorted({Shape(t, n), Shape(*largest)}, key=sum))
            for t, n in itertools.product(lengths[:, 0].tolist(), lengths[:, 1].tolist())
        ]
        assert padding(*one, shapes) == pytest.approx(min(tried))


def test_shapes_that_cannot_be():
    with pytest.raises(ValueError, match="buckets=0 must be at least 1"):
        choose_shapes(np.ones((2, 2), int), 0)
    with pytest.raises(ValueError, match="no items"):
        choose_shapes(np.zeros((0, 2), int), 2)
    with pytest.raises(ValueError, match="9 tokens and 3 regions fits none of"):
        shape_of(np.array([[1, 1], [9, 3]]), [Shape(4, 4)])


SHAPES = (Shape(2, 2), Shape(2, 4), Shape(4, 2), Shape(4, 4))


def plan(count: int, size: int, **options) -> QuestionPlan:
    return QuestionPlan(np.arange(count) % 4, SHAPES, batch_size=size, **options)


@pytest.mark.parametrize(("count", "size"), [(24, 4), (23, 4), (10, 7), (5, 5), (7, 3)])
def test_every_item_once_an_epoch(count, size):
    """Over `size` epochs, `count` batches, each item comes `size` times; after e epochs at least e - 1."""
    p = plan(count, size, seed=1)
    seen = np.zeros(count, int)
    for step in range(count):
        shape, items = p.rows(step)
        assert items.shape == (size,) and items.min() >= 0
        smallest = np.array(SHAPES)[items % 4]
        assert (smallest <= SHAPES[shape]).all()
        seen += np.bincount(items, minlength=count)
        epochs = (step + 1) * size // count
        assert seen.min() >= epochs - 1 and seen.max() <= epochs + 2
        if (step + 1) * size % count == 0:
            assert (seen == epochs).all()
    assert (seen == size).all()


def test_any_start_gives_the_same_steps_and_hosts_take_parts():
    whole = plan(23, 6, seed=5)
    steps = [whole.rows(step) for step in range(40)]
    for start in (39, 7, 21):
        shape, items = plan(23, 6, seed=5).rows(start)
        assert shape == steps[start][0] and np.array_equal(items, steps[start][1])
    parts = [plan(23, 6, seed=5, process_index=p, process_count=3) for p in range(3)]
    for step, (shape, items) in enumerate(steps):
        found = [part.rows(step) for part in parts]
        assert {s for s, _ in found} == {shape}
        assert np.array_equal(np.concatenate([i for _, i in found]), items)
    assert any(not np.array_equal(plan(23, 6, seed=6).rows(s)[1], steps[s][1]) for s in range(3))


def test_the_order_is_new_in_each_epoch_and_mixes_the_shapes():
    p = plan(400, 4)
    epochs = [[p.rows(100 * e + k) for k in range(100)] for e in range(3)]
    orders = [[shape for shape, _ in epoch] for epoch in epochs]
    assert all(sum(a != b for a, b in itertools.pairwise(order)) > 50 for order in orders)
    assert orders[0] != orders[1] != orders[2]
    batches = [{tuple(sorted(items.tolist())) for _, items in epoch} for epoch in epochs]
    assert not batches[0] & batches[1] and not batches[1] & batches[2]


def test_a_part_of_the_items():
    items = np.array([1, 2, 5, 9, 17])
    p = plan(20, 5, items=items)
    for step in range(4):
        assert sorted(p.rows(step)[1].tolist()) == items.tolist()
    with pytest.raises(ValueError, match="batch_size=6 is more than the 5 items"):
        plan(20, 6, items=items)


@pytest.mark.parametrize(("count", "hosts"), [(23, 1), (23, 2), (8, 4), (1, 2)])
def test_evaluation_has_every_item_once(count, hosts):
    bucket = np.arange(count) % 4
    parts = [evaluation_rows(bucket, SHAPES, 4, p, hosts) for p in range(hosts)]
    assert len({len(rows) for _, rows in parts}) == 1
    rows = np.concatenate([part for _, part in parts], axis=1)
    assert sorted(rows[rows >= 0].tolist()) == list(range(count))
    assert (rows < 0).sum() == -count % 4 and not (rows[:-1] < 0).any()
    for (shape, _), row in zip(zip(parts[0][0], rows, strict=True), rows, strict=True):
        items = np.where(row < 0, -1 - row, row)
        assert (np.array(SHAPES)[items % 4] <= SHAPES[shape]).all()
