from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from clipdistill_jax.train import sharding, state
from clipdistill_jax.train.sharding import infer_sharding, make_mesh
from tests.train.toy_run import HIDDEN, OUT, ROWS, WIDTH, batch_at, host, init, loss_fn, make

TENSOR_RULES = (
    ("first/kernel$", (None, "tensor")),
    ("first/bias$", ("tensor",)),
    ("second/kernel$", ("tensor",)),
)


def mesh_of(data, fsdp, tensor):
    return make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])


def train(mesh, rules=(), steps=3):
    now, step_fn, _ = make(mesh, rules=rules)
    losses, norms, compiled = [], [], step_fn._cache_size()
    with jax.set_mesh(mesh):
        for i in range(steps):
            now, found = step_fn(now, None, sharding.place_batch(batch_at(i), mesh))
            losses.append(float(found["loss"][0]))
            norms.append(float(found["grad_norm"][0]))
    assert step_fn._cache_size() <= compiled + 1
    return now, losses, norms


@pytest.fixture(scope="module")
def one_device():
    return train(mesh_of(1, 1, 1))


@pytest.mark.parametrize(
    ("shape", "first", "second"),
    [  # what one device holds of the kernels [8, 32] and [32, 4]
        ((8, 1, 1), (8, 32), (32, 4)),
        ((1, 8, 1), (8, 4), (4, 4)),
        ((2, 2, 2), (4, 16), (16, 2)),
    ],
    ids=["data", "fsdp", "all"],
)
def test_eight_devices_equal_one(one_device, shape, first, second):
    mesh = mesh_of(*shape)
    rules = TENSOR_RULES if shape[2] > 1 else ()
    now, losses, norms = train(mesh, rules)
    expected, expected_losses, expected_norms = one_device
    # The order of sums differs: a few bits in a float32 mean over 16 rows.
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-5)
    for name, x in host(expected).items():
        np.testing.assert_allclose(host(now)[name], x, rtol=1e-4, atol=2e-6, err_msg=name)
    # The sharding took effect, before and after steps, on parameters and on both moments.
    for name, want in (("first/kernel", first), ("second/kernel", second)):
        held = [x for key, x in sharding.named_leaves(now).items() if key.endswith(name)]
        assert len(held) == 3
        for x in held:
            assert len(x.addressable_shards) == 8
            assert {shard.data.shape for shard in x.addressable_shards} == {want}


@pytest.mark.parametrize("shape", [(2, 2, 2)])
def test_gradients_equal_one_device(shape):
    def grads(mesh, rules):
        start, _, _ = make(mesh, rules=rules)
        run = jax.jit(
            jax.grad(lambda p, b: loss_fn(p, start.model_state, None, b, jax.random.key(1), 0)[0]),
            out_shardings=jax.tree.map(lambda x: x.sharding, start.params),
        )
        with jax.set_mesh(mesh):
            return host(run(start.params, sharding.place_batch(batch_at(0), mesh)))

    found = grads(mesh_of(*shape), TENSOR_RULES if shape[2] > 1 else ())
    for name, x in grads(mesh_of(1, 1, 1), ()).items():
        np.testing.assert_allclose(found[name], x, rtol=2e-5, atol=1e-6, err_msg=name)


def test_a_batch_lies_in_parts_on_every_device():
    mesh = mesh_of(2, 4, 1)
    placed = sharding.place_batch(batch_at(0), mesh)
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(ROWS // 8, WIDTH)}
    np.testing.assert_array_equal(placed["x"], batch_at(0)["x"])
    assert sharding.process_parts(mesh) == (0, 1)
    with pytest.raises(ValueError, match=r"batch\['x'\] of shape \(12, 3\) .* over 8 devices"):
        sharding.place_batch({"x": np.zeros((12, 3))}, mesh)


def spec(shape, mesh, rules=(), size=1, name="a/kernel"):
    tree = {"a": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    return infer_sharding(tree, mesh, rules, size)["a"]["kernel"].spec


def test_fsdp_takes_the_largest_free_dimension_that_divides():
    mesh = mesh_of(1, 4, 2)
    assert spec((8, 12), mesh) == P(None, "fsdp")
    assert spec((8, 13), mesh) == P("fsdp", None)
    assert spec((8, 12), mesh, [("kernel", (None, "tensor"))]) == P("fsdp", "tensor")
    assert spec((8, 12), mesh, size=97) == P(None, None)
    assert spec((8, 16), mesh, [("kernel", (None, ("fsdp", "tensor")))]) == P(None, ("fsdp", "tensor"))
    first_wins = [("bias", ("tensor",)), ("^a/", ()), ("kernel", ("tensor",))]
    assert spec((8, 12), mesh, first_wins) == P(None, "fsdp")
    assert spec((8, 12), mesh_of(4, 1, 2)) == P(None, None)


def test_what_cannot_be_split_is_copied_and_said(caplog):
    assert spec((5, 7), mesh_of(1, 4, 1)) == P(None, None)
    assert "a/kernel (5, 7): no free dimension divides over 4 devices" in caplog.text


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("kernel", ("model",)), "the mesh has no axis 'model'"),
        (("kernel", (None, "tensor")), "a/kernel of shape .* 7 does not divide over 2 devices"),
        (("kernel", (None, None, "tensor")), "more entries than dimensions"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        spec((8, 7), mesh_of(1, 1, 2), [rule])


def test_mesh_axes():
    assert dict(make_mesh(fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert set(make_mesh().axis_types) == {AxisType.Auto}
    with pytest.raises(ValueError, match="needs 6 devices, but there are 8"):
        make_mesh(2, 3, 1)
    with pytest.raises(ValueError, match="positive"):
        make_mesh(2, 0, 1)


def test_slices_are_joined_along_data():
    devices = [
        SimpleNamespace(id=i, slice_index=i // 4, process_index=i // 4, platform="gpu", device_kind="x")
        for i in range(8)
    ]
    grid = sharding._join_slices((4, 2, 1), 2, devices)
    assert grid.shape == (4, 2, 1)
    assert [{d.slice_index for d in row.flat} for row in grid] == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match="multiple of the number of slices"):
        sharding._join_slices((1, 8, 1), 2, devices)


def test_the_part_of_the_batch_that_a_process_brings():
    assert sharding._one_part([4, 5], 8) == (2, 4)
    assert sharding._one_part([3], 4) == (3, 4)
    for held in ([0, 2], [1, 2], [0, 1, 2]):
        with pytest.raises(ValueError, match="not one equal part"):
            sharding._one_part(held, 8)


def test_half_an_address_is_refused(monkeypatch):
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: started.append(args))
    with pytest.raises(ValueError, match="set CLIPDISTILL_PROCESS_ID too"):
        sharding.init_distributed({"CLIPDISTILL_COORDINATOR": "a:1", "CLIPDISTILL_NUM_PROCESSES": "2"})
    assert not sharding.init_distributed({"JAX_PLATFORMS": "cpu"})
    slurm = {"JAX_PLATFORMS": "cpu", "SLURM_STEP_NODELIST": "n"}
    assert not sharding.init_distributed({**slurm, "SLURM_NTASKS": "1"})
    assert started == []
    assert sharding.init_distributed({**slurm, "SLURM_NTASKS": "2"})
    env = {"CLIPDISTILL_COORDINATOR": "a:1", "CLIPDISTILL_NUM_PROCESSES": "2", "CLIPDISTILL_PROCESS_ID": "1"}
    assert sharding.init_distributed(env)
    assert started == [(), ("a:1", 2, 1)]


def test_read_weights_go_where_the_parameters_are():
    mesh = mesh_of(1, 4, 1)
    start, _, _ = make(mesh, ema_decay=0.9)
    read = jax.tree.map(np.asarray, init(jax.random.key(9))[0])
    now = state.with_params(start, read, {"mean": np.ones(HIDDEN, np.float32)})
    for tree in (now.params, now.ema):
        np.testing.assert_array_equal(tree["first"]["kernel"], read["first"]["kernel"])
        assert tree["first"]["kernel"].sharding == start.params["first"]["kernel"].sharding
    assert now.params["first"]["kernel"] is not now.ema["first"]["kernel"]
    np.testing.assert_array_equal(now.model_state["mean"], np.ones(HIDDEN))
    read["second"] = {"kernel": np.zeros((HIDDEN, OUT + 1), np.float32), "extra": np.zeros(1)}
    with pytest.raises(ValueError) as error:
        state.with_params(start, read)
    assert "second/kernel: expected float32[32, 4], found float32[32, 5]" in str(error.value)
    assert "second/extra: expected nothing, found float64[1]" in str(error.value)


def test_abstract_state_needs_no_memory_and_agrees_with_the_real_one():
    mesh = mesh_of(2, 2, 2)
    start, _, optimizer = make(mesh, rules=TENSOR_RULES)
    shapes = state.abstract(init, optimizer, mesh, rules=TENSOR_RULES, fsdp_min_size=64)
    assert jax.tree.structure(shapes) == jax.tree.structure(start)
    assert state.signature(shapes) == state.signature(start)
    assert jax.tree.leaves(state.shardings_of(shapes)) == jax.tree.leaves(state.shardings_of(start))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
