"""`prepare regions` on a small VCR tree, with a CLIP and a ResNet, read back as a student reads it."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from clipdistill_jax import prepare
from clipdistill_jax.convert import hf_clip, resnet
from clipdistill_jax.data.regions import join, most_confident, prepend_image
from clipdistill_jax.data.regions.extract import fit_square
from clipdistill_jax.data.regions.uniter import NpzFolder, vcr_names
from clipdistill_jax.models.clip import ClipTextConfig, ClipVision, ClipVisionConfig, param_shapes
from clipdistill_jax.models.resnet import ResNet, variable_shapes
from clipdistill_jax.prepare_regions import load_tower
from tests.data.regions.test_boxes import vcr_tree, write_boxes

VISION = ClipVisionConfig(
    image_size=32, patch_size=8, width=64, layers=1, heads=1, mlp_width=64, projection_dim=12
)
TEXT = ClipTextConfig(
    vocab_size=20, context_length=8, width=64, layers=1, heads=1, mlp_width=64, projection_dim=12
)
DETECTED = [[16, 12, 32, 24, 0.3], [0, 0, 64, 48, 0.9]]


def random_params(shapes):
    """Parameters of those shapes, made here: an initialisation compiles longer than the model."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        deviation = np.prod(x.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.1
        x = deviation * rng.normal(size=x.shape) + (path[-1].key in ("scale", "var"))
        return np.asarray(x, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP in a Hugging Face directory, and its vision parameters."""
    folder = tmp_path_factory.mktemp("clip")
    params = random_params(param_shapes(VISION, TEXT))
    hf_clip.save(folder, (VISION, TEXT), params)
    return folder, params["vision"]


@pytest.fixture
def tree(tmp_path):
    return vcr_tree(tmp_path / "vcr")


def command(tree, out, tower, boxes, *more):
    given = {"format": "vcr", "source": tree, "out": out, "tower": tower, "boxes": boxes, "splits": "train"}
    options = [f"--{name}={value}" for name, value in given.items()]
    return prepare.main(["regions", *options, "--batch_size=2", "--workers=1", *more])


def pooled(grid, box):
    """Mean of bilinear samples of a map [h, h, C], 14 a side, in a box in cells; edges are repeated."""
    side = len(grid)
    x, y = (box[k] - 0.5 + (box[k + 2] - box[k]) * (np.arange(14) + 0.5) / 14 for k in (0, 1))
    total = 0
    for v in np.clip(y, 0, side - 1):
        for u in np.clip(x, 0, side - 1):
            for i in {int(v), min(int(v) + 1, side - 1)}:
                for j in {int(u), min(int(u) + 1, side - 1)}:
                    total = total + (1 - abs(v - i)) * (1 - abs(u - j)) * grid[i, j]
    return total / 14**2


@pytest.mark.parametrize("project", [False, True])
def test_clip(tree, tmp_path, clip, capsys, project):
    folder, params = clip
    out = tmp_path / "out"
    boxes = write_boxes(tmp_path / "boxes.json", {"m/a.jpg": DETECTED, "m/b.jpg": []})
    options = ["--image_size=64", *(["--project"] if project else [])]
    assert command(tree, out, folder, boxes, *options) == 0
    assert "4 files of 2 images, 4 of them written now" in capsys.readouterr().out

    # The features again: 8 x 8 patches of a picture that fills the upper three quarters.
    vision, changed = hf_clip.at_image_size(VISION, {"vision": params}, 64)
    image = tree / "vcr1images/m/a.jpg"
    pixels = fit_square(Image.open(image), 64, VISION.mean).pixels
    states = jax.jit(ClipVision(vision).apply)({"params": changed["vision"]}, pixels[None]).hidden[-1][0, 1:]
    states = np.asarray(states, np.float64)
    centred = states - states.mean(-1, keepdims=True)
    states = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + VISION.ln_eps)
    states = states * np.asarray(params["ln_post"]["scale"]) + np.asarray(params["ln_post"]["bias"])
    if project:
        states = states @ np.asarray(params["projection"]["kernel"])
    grid = states.reshape(8, 8, -1)
    width = 12 if project else 64

    regions = NpzFolder(out, width=width)
    annotated_name, detected_name = vcr_names("train", image)
    annotated, detected = regions[annotated_name], regions[detected_name]
    tolerance = {"rtol": 2e-3, "atol": 2e-3}  # half precision of numbers near 1
    expected = [pooled(grid, box) for box in ([0, 0, 4, 3], [4, 1.5, 8, 6])]  # of the metadata, in cells
    np.testing.assert_allclose(annotated.features, expected, **tolerance)
    expected = [pooled(grid, box) for box in ([0, 0, 8, 6], [2, 1.5, 4, 3])]  # the most confident first
    np.testing.assert_allclose(detected.features, expected, **tolerance)
    assert np.abs(detected.features[0] - detected.features[1]).max() > 0.1
    with np.load(out / annotated_name) as file:
        np.testing.assert_allclose(file["image"], expected[0], **tolerance)

    both = join(annotated, most_confident(detected), detected_name, num_objects=2)
    np.testing.assert_array_equal(both.ground_truth, [True, True, False, False])
    np.testing.assert_allclose(both.conf, [1, 1, 0.9, 0.3], rtol=1e-6)
    assert len(prepend_image(both)) == 5

    assert command(tree, out, folder, boxes, *options) == 0
    assert "4 files of 2 images, 0 of them written now" in capsys.readouterr().out
    assert command(tree, out, folder, "metadata", *options) == 1
    assert "was made with boxes='sha256" in capsys.readouterr().err


def test_resnet(tree, tmp_path, capsys):
    model = ResNet(stages=(1, 1, 1, 1), width=4, num_classes=3)
    variables = random_params(variable_shapes(model))
    file = tmp_path / "resnet.safetensors"
    safetensors.numpy.save_file(resnet.to_state_dict(model, variables), file)
    out = tmp_path / "out"
    (tree / "vcr1images/m/b.jpg").write_bytes(b"no jpeg")
    assert command(tree, out, file, "grid:2", "--image_size=64", "--level=c4") == 1
    assert "1 of 2 images are missing or unreadable" in capsys.readouterr().err
    assert command(tree, out, file, "grid:2", "--image_size=64", "--level=c4", "--max_unreadable=0.5") == 0
    assert "1 x unreadable_image" in capsys.readouterr().out
    found = NpzFolder(out, width=64)["vcr_train_a.npz"]
    pixels = fit_square(Image.open(tree / "vcr1images/m/a.jpg"), 64, model.mean).pixels
    c4 = np.asarray(jax.jit(lambda x: model.apply(variables, x).c4[0])(pixels[None]))
    expected = [pooled(c4, box) for box in ([0, 0, 2, 1.5], [2, 0, 4, 1.5], [0, 1.5, 2, 3], [2, 1.5, 4, 3])]
    scale = np.abs(c4).max()
    np.testing.assert_allclose(found.features, expected, rtol=2e-3, atol=1e-3 * scale)

    tower = load_tower(str(file), image_size=64)
    assert jax.eval_shape(tower.maps, tower.variables, pixels[None]).shape == (1, 2, 2, 128)  # c5
    assert load_tower(str(file)).image_size == 800


def test_mistakes(tree, tmp_path, clip, capsys):
    def fails(said, *arguments):
        assert command(tree, tmp_path / "out", *arguments) == 1
        error = capsys.readouterr().err
        assert said in error and error.startswith("error: ") and not list(tmp_path.glob("out/*.npz"))

    folder = clip[0]
    fails("not a directory", tmp_path / "none", "metadata")
    fails("not a multiple of the patch size 8", folder, "metadata", "--image_size=60")
    fails("a CLIP has no levels", folder, "metadata", "--level=c5")
    fails("grid:N", folder, "grid:50")
    fails("splits has ['val']", folder, "metadata", "--splits=val")
    fails("--batch_size=0", folder, "metadata", "--batch_size=0")
    fails("none.json is missing", folder, tmp_path / "none.json")
    safetensors.numpy.save_file({"x": np.zeros(1)}, tmp_path / "other.safetensors")
    fails("neither a CLIP", tmp_path / "other.safetensors", "metadata")
    file = tmp_path / "resnet.safetensors"
    names = {"conv1.weight": np.zeros((4, 3, 7, 7)), "layer1.0.conv1.weight": np.zeros((4, 4, 1, 1))}
    safetensors.numpy.save_file(names, file)
    fails("has no projection", file, "metadata", "--project")
    fails("missing: bn1.bias", file, "metadata")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/holiday.txt").touch()
    fails("not empty", folder, "metadata")
    (tmp_path / "out/manifest.json").touch()
    fails("holds a prepared dataset", folder, "metadata")


def test_computes_without_tensorflow():
    code = (
        "import sys; sys.modules['tensorflow'] = None; sys.modules['tensorflow_datasets'] = None\n"
        "import clipdistill_jax.prepare_regions"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
