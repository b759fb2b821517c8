import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipdistill_jax.train import sharding
from clipdistill_jax.train.checkpoint import Checkpointer, CheckpointError, load
from clipdistill_jax.train.state import shardings_of
from tests.train.toy_run import batch_at, host, make


def mesh_of(data, fsdp=1, tensor=1):
    return sharding.make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])


def template_of(state):
    return sharding.shape_structs(state, shardings_of(state))


@pytest.fixture(scope="module")
def toy():
    """A state after two steps, the step function and the mesh; tests must not donate the state."""
    mesh = mesh_of(1)
    state, step_fn, _ = make(mesh, ema_decay=0.5)
    for i in range(2):
        state, _ = step_fn(state, None, sharding.place_batch(batch_at(i), mesh))
    return state


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory, toy):
    """Steps 2 and 4 of the toy, whole."""
    root = tmp_path_factory.mktemp("saved")
    keeper = Checkpointer(root, identity={"teacher": "abc", "layers": (1, 2)})
    for step in (2, 4):
        keeper.save(step, toy, {"val/r1": step / 8}, {"skipped_steps": 0})
    keeper.close()
    return root


@pytest.fixture
def saved(tmp_path, saved_once):
    """A copy of them that a test may spoil."""
    return shutil.copytree(saved_once, tmp_path / "run")


def open_saved(root, **options):
    return Checkpointer(root, **{"identity": {"teacher": "abc", "layers": (1, 2)}, **options})


def test_what_is_saved_comes_back_bit_for_bit(saved, toy):
    keeper = open_saved(saved)
    assert keeper.latest() == 4
    back = keeper.restore(template_of(toy), 4)
    assert jax.tree.structure(back) == jax.tree.structure(toy)
    for name, x in host(toy).items():
        np.testing.assert_array_equal(host(back)[name], x, err_msg=name)
        assert host(back)[name].dtype == x.dtype
    manifest = keeper.manifest(4)
    assert manifest["metrics"] == {"val/r1": 0.5} and manifest["extra"] == {"skipped_steps": 0}
    assert manifest["arrays"]["params/first/kernel"] == {"shape": [8, 32], "dtype": "float32"}
    assert manifest["devices"]["count"] == 8 and manifest["versions"]["jax"] == jax.__version__


def test_a_save_under_way_does_not_see_the_next_step(tmp_path):
    mesh = mesh_of(2)
    state, step_fn, _ = make(mesh)
    keeper, kept = Checkpointer(tmp_path, keep=9), {}
    for i in range(6):
        state, _ = step_fn(state, None, sharding.place_batch(batch_at(i), mesh))
        kept[i + 1] = host(state)
        keeper.save(i + 1, state)  # the next step donates these buffers at once
    template = template_of(state)
    for step, expected in kept.items():
        for name, x in host(keeper.restore(template, step)).items():
            np.testing.assert_array_equal(x, expected[name], err_msg=f"{step} {name}")
    keeper.close()


def test_restores_onto_eight_two_and_one_devices(tmp_path):
    def step_on(mesh, state, i):
        step_fn = make(mesh)[1]
        with jax.set_mesh(mesh):
            return step_fn(state, None, sharding.place_batch(batch_at(i), mesh))[0]

    expected = make(mesh_of(1))[0]
    for i in range(3):
        expected = step_on(mesh_of(1), expected, i)

    state = None
    for i, mesh in enumerate([mesh_of(2, 4), mesh_of(1, 2), mesh_of(1)]):
        fresh = make(mesh)[0]
        if state is None:
            state = fresh
        else:
            keeper = Checkpointer(tmp_path)
            state = keeper.restore(template_of(fresh), keeper.latest())
            assert jax.tree.leaves(shardings_of(state)) == jax.tree.leaves(shardings_of(fresh))
        kernel = state.opt_state[0]["train"].inner_state[1].mu["first"]["kernel"]
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 32 // mesh.shape["fsdp"])}
        state = step_on(mesh, state, i)
        keeper = Checkpointer(tmp_path)
        keeper.save(i + 1, state)
        keeper.close()
    for name, x in host(expected).items():
        np.testing.assert_allclose(host(state)[name], x, rtol=1e-4, atol=2e-6, err_msg=name)


def small(value=0.0):
    return {"x": jnp.full((4,), value)}


def steps_in(root):
    return sorted(int(path.name) for path in root.iterdir())


@pytest.mark.parametrize(("mode", "best"), [("max", 20), ("min", 30)])
def test_keeps_the_last_and_the_best(tmp_path, mode, best):
    keeper = Checkpointer(tmp_path, keep=2, best_metric="val/r1", best_mode=mode)
    assert keeper.latest() is None and keeper.best() is None
    assert keeper.improves({"val/r1": 0.1})
    for step, value in ((10, 0.3), (20, 0.7), (30, 0.1), (40, 0.5), (50, None), (60, 0.4)):
        keeper.save(step, small(), {} if value is None else {"val/r1": value})
    keeper.close()
    assert steps_in(tmp_path) == sorted({best, 50, 60})
    again = Checkpointer(tmp_path, best_metric="val/r1", best_mode=mode)
    assert again.latest() == 60 and again.best() == best
    assert again.improves({"val/r1": {"max": 0.8, "min": 0.05}[mode]})
    assert not again.improves({"val/r1": 0.4})
    with pytest.raises(ValueError, match="'val/r1' is missing or not finite; evaluated: val/r5"):
        again.improves({"val/r5": 1.0})


def test_a_step_is_not_overwritten(saved, toy):
    with pytest.raises(CheckpointError, match="00000004 exists"):
        open_saved(saved).save(4, toy)


def test_another_tree_shape_or_dtype_is_refused_by_path(saved, toy):
    template = template_of(toy)
    first = template.params["first"]
    changed = {
        "first": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32), "scale": first["bias"]},
        "second": {"kernel": jax.ShapeDtypeStruct((32, 4), jnp.bfloat16)},
    }
    with pytest.raises(CheckpointError) as error:
        open_saved(saved).restore(template.replace(params=changed), 4)
    message = str(error.value)
    assert "00000004 does not fit this run" in message
    assert "params/first/kernel: expected float32[8, 16], found float32[8, 32]" in message
    assert "params/first/scale: expected float32[32], found nothing" in message
    assert "params/second/kernel: expected bfloat16[32, 4], found float32[32, 4]" in message
    assert "params/first/bias: expected nothing, found float32[32]" in message
    with pytest.raises(CheckpointError, match="ema/first/bias: expected nothing, found"):
        open_saved(saved).restore(template.replace(ema=None), 4)


def test_another_teacher_is_refused_with_both_names(saved, toy):
    keeper = open_saved(saved, identity={"teacher": "xyz", "layers": [1, 2]})
    with pytest.raises(CheckpointError, match="written with teacher = 'abc', but this run has 'xyz'"):
        keeper.restore(template_of(toy), 4)
    with pytest.raises(CheckpointError, match="written with layers = .*, but this run has None"):
        Checkpointer(saved, identity={"teacher": "abc"}).restore(template_of(toy), 4)


def truncate(step):
    file = max(step.glob("**/d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-7])


def remove_arrays(step):
    shutil.rmtree(step / "ocdbt.process_0")


def leave_unrenamed(step):
    step.rename(step.with_name(f"{step.name}.orbax-checkpoint-tmp"))


def cut_manifest(step):
    text = (step / "manifest.json").read_text()
    (step / "manifest.json").write_text(text[: len(text) // 2])


SPOILS = {
    truncate: r"the file .* has \d+ bytes instead of \d+",
    remove_arrays: "the file ocdbt.process_0/.* is missing",
    leave_unrenamed: r"it was never finished \(there is only 00000004.orbax-checkpoint-tmp\)",
    cut_manifest: "its manifest.json cannot be read",
    lambda step: (step / "manifest.json").unlink(): "it has no manifest.json",
    shutil.rmtree: "it does not exist",
}


@pytest.mark.parametrize(("spoil", "why"), SPOILS.items())
def test_a_half_written_step_is_refused_and_passed_over(saved, toy, caplog, spoil, why):
    spoil(saved / "00000004")
    keeper = open_saved(saved)
    with pytest.raises(CheckpointError, match=rf"00000004 cannot be used: {why}.*\. Delete or move"):
        keeper.restore(template_of(toy), 4)
    assert keeper.latest() == 2
    if spoil is not shutil.rmtree:
        assert "00000004" in caplog.text and "passing over" in caplog.text
    # The run that goes on from step 2 comes to step 4 again.
    keeper.save(4, toy)
    keeper.close()
    assert keeper.latest() == 4 and steps_in(saved) == [2, 4]
    np.testing.assert_array_equal(host(keeper.restore(template_of(toy), 4))["step"], 2)


def test_damage_that_keeps_the_size_is_still_an_error_that_names_the_checkpoint(saved, toy):
    for file in (saved / "00000004").glob("**/d/*"):
        file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(CheckpointError, match="00000004 cannot be read"):
        open_saved(saved).restore(template_of(toy), 4)


def test_parts_can_be_read_without_a_template(saved, toy):
    found = load(saved)
    assert found.keys() == {"params", "model_state", "ema"}
    for part in found:
        expected = host(getattr(toy, part))
        assert host(found[part]).keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_array_equal(host(found[part])[name], x)
    assert isinstance(found["params"]["first"]["kernel"], np.ndarray)
    assert load(saved, 2, parts=("model_state",)).keys() == {"model_state"}
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        load(saved / "nothing")


def test_the_manifest_is_plain_json(saved):
    manifest = json.loads((saved / "00000002" / "manifest.json").read_text())
    assert manifest["step"] == 2 and manifest["identity"] == {"teacher": "abc", "layers": [1, 2]}
    assert all(size > 0 for size in manifest["files"].values())
