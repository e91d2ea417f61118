"""All 994 connected graphs of three to seven nodes, from networkx's atlas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import networkx
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from experiments.tasks.splits import SplitData, shares

LARGEST_DEGREE = 6  # with seven nodes


class GraphBatch(NamedTuple):
    """Several graphs as one that is not connected.

    Attributes:
        targets: a number for each graph [graphs].
        features: of each node [nodes, features].
        edges: from and to, each edge in both directions [2, 2 edges].
        graph: which one a node belongs to [nodes].
    """

    targets: Tensor
    features: Tensor
    edges: Tensor
    graph: Tensor


class Graph(NamedTuple):
    """One graph: its target [], features [nodes, features] and edges [2, 2 edges]."""

    target: Tensor
    features: Tensor
    edges: Tensor


class Graphs(Dataset[Any]):
    """Graphs of different sizes."""

    def __init__(self, graphs: Sequence[Graph]) -> None:
        self.graphs = graphs

    def __len__(self) -> int:
        return len(self.graphs)

    def __getitems__(self, indices: Sequence[int]) -> GraphBatch:
        """These graphs in one batch."""
        return merge([self.graphs[i] for i in indices])


class GraphAtlas(SplitData):
    """Graphs with the degrees of their nodes, and how well each is connected.

    The target is the algebraic connectivity: the second smallest eigenvalue of the Laplacian
    (Fiedler 1973), between 0.2 for a long path and 7 for the complete graph. No two graphs are
    isomorphic, so no graph is in two splits.

    Args:
        batch_size: graphs in a training step.
        val_size: graphs held out of training to choose by.
        test_size: graphs held out of everything.
        split_seed: which graphs these are. Part of the task, not of a run: keep it.
        seed: of the order in which training graphs are drawn.

    Raises:
        ValueError: a size is not positive, or leaves nothing to train on.
    """

    def __init__(
        self,
        batch_size: int = 64,
        val_size: int = 150,
        test_size: int = 150,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        self.val_size = val_size
        self.test_size = test_size
        self.split_seed = split_seed

    @property
    def dimensions(self) -> dict[str, Any]:
        """One number for each degree that a node may have; one to predict."""
        return {"inputs": LARGEST_DEGREE + 1, "outputs": 1}

    def make_splits(self) -> dict[str, Graphs]:
        """Load and split."""
        atlas = networkx.graph_atlas_g()
        graphs = [_tensors(g) for g in atlas if len(g) > 2 and networkx.is_connected(g)]
        parts = shares(len(graphs), self.val_size, self.test_size, self.split_seed)
        return {name: Graphs([graphs[i] for i in part]) for name, part in parts.items()}


def _tensors(graph: Any) -> Graph:
    number = {node: i for i, node in enumerate(graph)}
    pairs = torch.tensor([[number[a], number[b]] for a, b in graph.edges]).T
    edges = torch.cat([pairs, pairs.flip(0)], dim=1)  # [2, 2 edges]
    adjacency = torch.zeros(len(number), len(number), dtype=torch.float64)
    adjacency[edges[0], edges[1]] = 1
    degrees = adjacency.sum(1)
    eigenvalues = torch.linalg.eigvalsh(degrees.diag() - adjacency)  # ascending
    features = F.one_hot(degrees.long(), LARGEST_DEGREE + 1)
    return Graph(eigenvalues[1].float(), features.float(), edges)


def merge(graphs: Sequence[Graph]) -> GraphBatch:
    """Several graphs as one: nodes are numbered through."""
    sizes = torch.tensor([len(graph.features) for graph in graphs])
    starts = sizes.cumsum(0) - sizes
    return GraphBatch(
        targets=torch.stack([graph.target for graph in graphs]),
        features=torch.cat([graph.features for graph in graphs]),
        edges=torch.cat(
            [graph.edges + start for graph, start in zip(graphs, starts, strict=True)], dim=1
        ),
        graph=torch.arange(len(graphs)).repeat_interleave(sizes),
    )
