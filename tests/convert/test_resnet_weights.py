"""ResNet's weights in and out: parity with a torch module of the same names, round trips, refusals."""

import jax
import numpy as np
import pytest

from clipdistill_jax.convert.resnet import from_state_dict, rules, to_state_dict
from clipdistill_jax.models.resnet import PRESETS, variable_shapes

torch = pytest.importorskip("torch", reason="the reference is made of torch's layers")
nn = torch.nn


class Block(nn.Module):
    """A bottleneck from the paper's figure 5, its stride in the 3x3 convolution."""

    def __init__(self, wide, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(wide, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        if stride > 1 or wide != 4 * width:
            shortcut = nn.Conv2d(wide, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class Net(nn.Module):
    def __init__(self, stages, width, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        wide = width
        for i, blocks in enumerate(stages):
            made = []
            for j in range(blocks):
                made.append(Block(wide, width * 2**i, 2 if i and not j else 1))
                wide = 4 * width * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*made))
        if classes:
            self.fc = nn.Linear(wide, classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        c4 = self.layer3(self.layer2(self.layer1(x)))
        c5 = self.layer4(c4)
        return c4, c5, self.fc(c5.mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    """Every parameter and statistic moved from its initial value."""
    torch.manual_seed(0)
    made = Net((2, 1, 2, 1), 8, 7).eval()
    with torch.no_grad():
        for name, x in made.state_dict().items():
            if name.endswith("running_var"):
                x.uniform_(0.5, 2)
            elif x.ndim == 1:
                x.add_(0.2 * torch.randn_like(x))
    return made


@pytest.fixture(scope="module")
def state(net):
    return {name: x.numpy() for name, x in net.state_dict().items()}


def test_parity_with_torch(net, state):
    model, variables = from_state_dict(state)
    assert (model.stages, model.width, model.num_classes) == ((2, 1, 2, 1), 8, 7)
    images = np.random.default_rng(1).normal(size=(2, 64, 96, 3)).astype(np.float32)
    found = jax.jit(model.apply)(variables, images)
    with torch.no_grad():
        c4, c5, logits = net(torch.tensor(images.transpose(0, 3, 1, 2)))
    assert np.abs(c5).max() > 1  # float32 noise is far below the tolerance, a wrong stride far above
    np.testing.assert_allclose(found.c4, c4.permute(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(found.c5, c5.permute(0, 2, 3, 1), atol=1e-4)
    np.testing.assert_allclose(found.logits, logits, atol=1e-4)


def test_round_trip(state):
    model, variables = from_state_dict(state)
    back = to_state_dict(model, variables)
    assert back.keys() == state.keys()
    for name, x in back.items():
        np.testing.assert_array_equal(x, state[name] * (not name.endswith("num_batches_tracked")))
    bare = {k: v for k, v in state.items() if not k.startswith("fc.") and "num_batches" not in k}
    model, variables = from_state_dict(bare)  # as timm's num_classes=0
    assert model.num_classes is None and "fc" not in variables["params"]


@pytest.mark.parametrize(("name", "tensors"), [("resnet50", 267), ("resnet101", 522)])
def test_every_name_and_shape_of_the_published_sizes(name, tensors):
    with torch.device("meta"):
        theirs = Net(PRESETS[name], 64, 1000).state_dict()
    theirs = {k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")}
    table = rules(PRESETS[name], head=True)
    assert {rule.theirs for rule in table} == theirs.keys() and len(table) == tensors
    # Known to torchvision's users: the first, a middle and the last convolution.
    assert tuple(theirs["conv1.weight"].shape) == (64, 3, 7, 7)
    assert tuple(theirs["layer3.0.downsample.0.weight"].shape) == (1024, 512, 1, 1)
    assert tuple(theirs["layer4.2.conv3.weight"].shape) == (2048, 512, 1, 1)
    zeros = {k: np.broadcast_to(np.float32(0), v.shape) for k, v in theirs.items()}
    if name == "resnet50":  # every shape is checked on the way
        model, variables = from_state_dict(zeros)
        assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda x: x.shape, variable_shapes(model))


def test_refusals(state):
    with pytest.raises(ValueError, match=r"r\.pth.*missing: layer1\.1\.bn2\.running_var"):
        from_state_dict({k: v for k, v in state.items() if k != "layer1.1.bn2.running_var"}, "r.pth")
    with pytest.raises(ValueError, match=r"unknown: layer1\.0\.se\.fc\.weight"):
        from_state_dict(state | {"layer1.0.se.fc.weight": np.zeros(3)})
    with pytest.raises(ValueError, match=r"shapes do not fit.*layer2\.0\.conv2\.weight"):
        from_state_dict(state | {"layer2.0.conv2.weight": np.zeros((16, 8, 3, 3))})
    with pytest.raises(ValueError, match="no tensor 'conv1.weight'"):
        from_state_dict({"stem.conv.weight": np.zeros(3)})
