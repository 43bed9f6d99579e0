"""LPIPS: its published names, its network against PyTorch, and what is refused."""

import golden_values as gv
import numpy as np
import pytest
from safetensors.numpy import save_file

from dmf.checkpoints import load
from dmf.checkpoints.convert import namings
from dmf.checkpoints.convert.tables.lpips import NAMINGS
from dmf.errors import InputError
from dmf.models import LPIPS
from dmf.models.encoders.lpips import TRUNKS

MODULE, FILES = NAMINGS
PARAMETERS = {"vgg16": 14_716_160, "alexnet": 2_470_848}  # of the heads too


def shapes(naming, trunk):
    """The shapes of the tensors that a network is read from."""
    table = naming.table(LPIPS(trunk=trunk))
    return {name: entry.shape for name, entry in table.items()
            if isinstance(entry, namings.ParamSlice)}


def drawn(trunk):
    """Tensors by the names of the two files; heads are not negative."""
    draw = np.random.default_rng(3)
    tensors = {name: draw.normal(0, np.prod(shape[1:]) ** -0.5, shape).astype("f")
               for name, shape in shapes(FILES, trunk).items()}
    return {name: np.abs(x) if name.startswith("lin") else x for name, x in tensors.items()}


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.name)
def test_the_published_network(naming, trunk):
    """Five heads and the convolutions; the network is told by the first of these."""
    found = shapes(naming, trunk)
    assert naming.infer_network(found, {}) == LPIPS(trunk=trunk)
    assert sum(np.prod(shape) for shape in found.values()) == PARAMETERS[trunk]
    heads = [found[f"lin{i}.model.1.weight"][1] for i in range(5)]
    assert heads == {"vgg16": [64, 128, 256, 512, 512],
                     "alexnet": [64, 192, 384, 256, 256]}[trunk]


def refused(tensors, message):
    with pytest.raises(InputError, match=message):
        namings.from_named_tensors(tensors, {})


def test_a_part_alone_is_refused():
    tensors = {name: np.zeros((), "f") for name in shapes(FILES, "alexnet")}
    heads = {name: x for name, x in tensors.items() if name.startswith("lin")}
    trunk = {name: x for name, x in tensors.items() if name not in heads}
    refused(heads, "it holds the heads of LPIPS alone; give torchvision's")
    refused(trunk, "it holds the convolutions of VGG16 or AlexNet without the heads")
    first = {"features.0.weight": np.zeros((96, 3, 7, 7), "f")}
    refused(tensors | first, "'features.0.weight' has shape .*: it is that of none of vgg16, alex")


def pytorch_distances(tensors, trunk, a, b):
    """The distances of images [n, h, w, 3], computed by PyTorch's functions."""
    torch = pytest.importorskip("torch", reason="needs torch")
    from torch.nn import functional as F

    def features(images):
        x = (torch.from_numpy(images).permute(0, 3, 1, 2) - constant(-0.030, -0.088, -0.188))
        x, found = x / constant(0.458, 0.448, 0.450), []
        pools = {"vgg16": (5, 10, 17, 24), "alexnet": (3, 6)}[trunk]
        taps = {"vgg16": (2, 7, 14, 21, 28), "alexnet": (0, 3, 6, 8, 10)}[trunk]
        for number in sorted(int(k.split(".")[1]) for k in tensors if k.endswith(".bias")):
            if number in pools:
                x = F.max_pool2d(x, 2 if trunk == "vgg16" else 3, 2)
            strides = {0: (4, 2), 3: (1, 2)} if trunk == "alexnet" else {}
            stride, padding = strides.get(number, (1, 1))
            weight, bias = (torch.from_numpy(tensors[f"features.{number}.{part}"])
                            for part in ("weight", "bias"))
            x = torch.relu(F.conv2d(x, weight, bias, stride, padding))
            if number in taps:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def constant(*values):
        return torch.tensor(values)[None, :, None, None]

    heads = [torch.from_numpy(tensors[f"lin{i}.model.1.weight"]) for i in range(5)]
    return sum(F.conv2d((x - y) ** 2, head).mean((1, 2, 3))
               for x, y, head in zip(features(a), features(b), heads, strict=True)).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("trunk", TRUNKS)
def test_pytorch_computes_the_same(trunk, tmp_path):
    """From the two published files and from the module's one, and the same tensors again."""
    tensors = drawn(trunk)
    draw = np.random.default_rng(4)
    a, b = (draw.uniform(-1, 1, (2, 67, 80, 3)).astype("f") for _ in range(2))
    expected = pytorch_distances(tensors, trunk, a, b)
    for naming in NAMINGS:
        names = dict(zip(shapes(FILES, trunk), shapes(naming, trunk), strict=True))
        found = namings.from_named_tensors({names[k]: x for k, x in tensors.items()}, {})
        assert (found.naming, found.network) == (naming, LPIPS(trunk=trunk))
        params = gv.on_device(found.params)
        ours = gv.jit(found.network.apply)(params, a, b)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
        back = namings.to_named_tensors(found.network, found.params, naming)
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(back[names[name]], tensor, err_msg=name)
    assert not np.asarray(gv.jit(found.network.apply)(params, a, a)).any()


@pytest.mark.slow
def test_the_published_files_are_converted(tmp_path, capsys):
    """The classifier as torchvision stores it, with the layers that LPIPS does not use."""
    import tiny

    tensors = drawn("alexnet")
    heads = {name: x for name, x in tensors.items() if name.startswith("lin")}
    trunk = {name: x for name, x in tensors.items() if name not in heads}
    save_file(trunk | {"classifier.1.bias": np.zeros(3, "f")}, tmp_path / "alexnet.safetensors")
    save_file(heads, tmp_path / "heads.safetensors")
    source, output = tmp_path / "alexnet.safetensors", tmp_path / "lpips"
    heads_file = tmp_path / "heads.safetensors"
    assert tiny.dmf("convert", source, heads_file, f"--output={output}") == 0
    network, params = load.load_encoder(output, "lpips")
    assert network == LPIPS(trunk="alexnet")
    np.testing.assert_array_equal(params["head_4"], tensors["lin4.model.1.weight"].ravel())
    assert tiny.dmf("convert", source, f"--output={tmp_path / 'trunk'}") == 2
    assert "without the heads of LPIPS; give these as a second source" in capsys.readouterr().err
