"""facesets/tfjs_graph.py: a small graph of every kind of node against the same sums in NumPy."""
import base64
import json

import numpy as np
import pytest
import torch

from facesets.second_opinion import GraphEmbedder
from facesets.tfjs_graph import GraphModel


def node(name: str, op: str, inputs: list[str], **attributes) -> dict:
    """A node as TensorFlow.js writes it."""
    return {"name": name, "op": op, "input": inputs, "attr": attributes}


def text(value: str) -> str:
    """A string attribute."""
    return base64.b64encode(value.encode()).decode()


def convolution(stride: int, padding: str, *fused: str) -> dict:
    """Attributes of a convolution."""
    return {"strides": {"list": {"i": ["1", str(stride), str(stride), "1"]}},
            "padding": {"s": text(padding)},
            "fused_ops": {"list": {"s": [text(name) for name in fused]}}}


@pytest.fixture
def graph(tmp_path):
    """3x3 stride 2 SAME, batch norm, ReLU6; depthwise VALID; 1x1 with bias; mean; dense."""
    rng = np.random.default_rng(0)
    weights = {"k1": rng.normal(size=(3, 3, 3, 4)) / 100, "scale": rng.uniform(0.5, 1, 4),
               "shift": rng.normal(size=4), "zero": np.array(0.0), "six": np.array(6.0),
               "k2": rng.normal(size=(3, 3, 4, 1)), "k3": rng.normal(size=(1, 1, 4, 5)),
               "b3": rng.normal(size=5), "w": rng.normal(size=(5, 2)), "bw": rng.normal(size=2)}
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    nodes = [node("x", "Placeholder", []), *(node(name, "Const", []) for name in weights),
             node("conv", "Conv2D", ["x", "k1"], **convolution(2, "SAME")),
             node("scaled", "Mul", ["conv", "scale"]), node("shifted", "Add", ["scaled", "shift"]),
             node("relu", "Relu", ["shifted"]), node("low", "Minimum", ["relu", "six"]),
             node("relu6", "Maximum", ["low", "zero"]),
             node("deep", "DepthwiseConv2dNative", ["relu6", "k2"], **convolution(1, "VALID")),
             node("point", "_FusedConv2D", ["deep", "k3", "b3"],
                  **convolution(1, "SAME", "BiasAdd")),
             node("abs", "Abs", ["point"]), node("sum", "Add", ["point", "abs"]),
             node("mean", "Mean", ["sum"]),
             node("out", "_FusedMatMul", ["mean", "w", "bw"],
                  fused_ops={"list": {"s": [text("BiasAdd")]}})]
    entries = [{"name": name, "shape": list(value.shape), "dtype": "float32"}
               for name, value in weights.items()]
    (tmp_path / "g.bin").write_bytes(b"".join(value.tobytes() for value in weights.values()))
    (tmp_path / "g.json").write_text(json.dumps({
        "modelTopology": {"node": nodes},
        "weightsManifest": [{"paths": ["g.bin"], "weights": entries}]}))
    return tmp_path / "g.json", weights


def correlate(maps: np.ndarray, kernel: np.ndarray, stride: int,
              depthwise: bool = False) -> np.ndarray:
    """(H, W, C) by (h, w, C, outputs), without padding."""
    height, width = ((size - window) // stride + 1
                     for size, window in zip(maps.shape[:2], kernel.shape[:2], strict=True))
    rows = []
    for y in range(0, height * stride, stride):
        for x in range(0, width * stride, stride):
            part = maps[y:y + kernel.shape[0], x:x + kernel.shape[1]]
            rows.append((part * kernel[..., 0]).sum((0, 1)) if depthwise
                        else np.einsum("hwc,hwco->o", part, kernel))
    return np.stack(rows).reshape(height, width, -1)


def test_graph_agrees_with_numpy(graph):
    path, w = graph
    picture = np.random.default_rng(1).integers(0, 256, (10, 10, 3)).astype(np.float32)
    padded = np.pad(picture, ((0, 1), (0, 1), (0, 0)))                  # SAME: right and below
    maps = np.clip(correlate(padded, w["k1"], 2) * w["scale"] + w["shift"], 0, 6)
    maps = correlate(maps, w["k2"], 1, depthwise=True)
    maps = correlate(maps, w["k3"], 1) + w["b3"]
    expected = (maps + np.abs(maps)).mean((0, 1)) @ w["w"] + w["bw"]
    pictures = torch.from_numpy(picture).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    assert np.allclose(GraphModel(path, "out")(pictures)[1].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_embeddings_do_not_depend_on_the_batch(graph):
    path, _ = graph
    views = torch.randint(0, 256, (6, 3, 10, 10), dtype=torch.uint8)
    embeddings = GraphEmbedder(GraphModel(path, "out"), 10).embed(views)
    assert np.allclose(embeddings, GraphModel(path, "out")(views.float()).numpy(), atol=1e-4)


def test_unknown_operation_is_named(graph):
    path, _ = graph
    about = json.loads(path.read_text())
    about["modelTopology"]["node"].append(node("odd", "Erf", ["mean"]))
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="Erf"):
        GraphModel(path, "odd")(torch.zeros(1, 3, 10, 10))
