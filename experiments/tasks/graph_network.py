"""A network that passes messages along the edges of graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.tasks.graph_atlas import GraphBatch
from experiments.tasks.networks import dense
from experiments.tasks.task import Task


class GraphNetwork(nn.Module):
    """A graph isomorphism network: graphs -> [graphs, outputs].

        h ← perceptron((1 + ε) h + Σ h of the neighbours)

    in each layer; at the end the nodes of a graph are added up.

    Args:
        inputs: numbers that describe a node.
        outputs: numbers to return for a graph.
        width: numbers that describe a node inside.
        layers: how far messages travel, in edges.

    Raises:
        ValueError: a size is not positive.

    Source: Xu et al. 2019 (arXiv:1810.00826), GIN-ε.
    """

    def __init__(self, inputs: int, outputs: int, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        if min(width, layers) < 1:
            raise ValueError(f"width={width}, layers={layers}: expected positive whole numbers")
        self.encoder = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(_Layer(width) for _ in range(layers))
        self.readout = dense(width, outputs, [width], "relu")

    def forward(self, batch: GraphBatch) -> Tensor:
        """What is predicted of each graph."""
        nodes = self.encoder(batch.features)  # [nodes, width]
        for layer in self.layers:
            nodes = layer(nodes, batch.edges)
        empty = nodes.new_zeros(len(batch.targets), nodes.shape[1])
        return self.readout(empty.index_add(0, batch.graph, nodes))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.perceptron = dense(width, width, [width], "relu")
        self.eps = nn.Parameter(torch.zeros(()))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        messages = torch.zeros_like(nodes).index_add(0, target, nodes[source])
        return F.relu(self.perceptron((1 + self.eps) * nodes + messages))


class GraphRegression(Task):
    """Minimises the squared error of a number for each graph.

    Measures `loss`, `rmse` (its root) and `r2`, the share of the variance that is explained. These
    are no means over batches: what is measured has to come in one.
    """

    def loss(self, batch: GraphBatch) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(self(batch).squeeze(1), batch.targets)

    def measure(self, batch: GraphBatch) -> dict[str, Tensor]:
        """The error in three forms."""
        loss = self.loss(batch)
        r2 = 1 - loss / batch.targets.var(correction=0)
        return {"loss": loss, "rmse": loss.sqrt(), "r2": r2}
