"""C-RTS: substitutes from clusters of tokens, the clusters by how often a pair of them fooled the model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import linalg as sparse_linalg
from torch import Tensor

from unmask.draw import Draw
from unmask.errors import UserError

WINDOW, DIMENSIONS, ROUNDS = 5, 64, 50


def cluster_probabilities(counts: Tensor, beta: float = 2.0, *, official: bool = False) -> Tensor:
    """``[C, C]`` float64: row = cluster of the original, softmax over the substitute's of beta (count - min) / (max - min).

    Each row by its own minimum and range (range 0: 1). official: column j by the minimum and range of row j, as the authors' code
    broadcasts them.
    """
    low, high = counts.min(dim=1).values, counts.max(dim=1).values
    span = torch.where(high > low, high - low, 1).double()
    values = counts.double()
    scaled = (values - low) / span if official else (values - low[:, None]) / span[:, None]
    return (beta * scaled).softmax(dim=1)


def substitutes(
    tokens: Tensor, cluster_of: Tensor, probabilities: Tensor, cluster: Tensor, member: Tensor, special: Iterable[int]
) -> Tensor:
    """int64 ``[N]``: a token of a drawn cluster for each of ``tokens [N]``. cluster, member: uniforms ``[N]``; the cluster by the
    inverse of its cumulative distribution, the member with index int(u · count) among the cluster's usable ones, ascending."""
    count = len(probabilities)
    order, offsets, sizes = members(cluster_of, count, special)
    edges = probabilities.cumsum(dim=1)[cluster_of[tokens]]
    drawn = (edges <= cluster.double()[:, None]).sum(dim=1).clamp(max=count - 1)
    return order[offsets[drawn] + (member.double() * sizes[drawn]).long()]


def members(cluster_of: Tensor, count: int, special: Iterable[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ordered by cluster then id, where each cluster begins, and how many usable tokens it has; special ones left out."""
    usable = cluster_of.clone()
    usable[torch.tensor(sorted(set(special)), dtype=torch.long, device=usable.device)] = count
    sizes = torch.bincount(usable, minlength=count + 1)[:count]
    return usable.argsort(stable=True), sizes.cumsum(0) - sizes, sizes


def count_changes(
    original: Tensor, substituted: Tensor, wrong: Tensor, where: Tensor, cluster_of: Tensor, count: int
) -> Tensor:
    """``[C, C]`` int64: +1 for each place where the model decided wrongly, -1 where rightly. where: bool, the places that count."""
    cell = cluster_of[original] * count + cluster_of[substituted]
    step = torch.where(wrong, 1, -1) * where
    return (
        torch.zeros(count * count, dtype=torch.int64, device=cell.device)
        .index_add_(0, cell.flatten(), step.flatten())
        .view(count, count)
    )


def check_map(cluster_of: Tensor, vocabulary: int, special: Iterable[int]) -> int:
    """The number of clusters. Raises ``UserError`` for a map of another vocabulary, and for a cluster without a usable token."""
    if len(cluster_of) != vocabulary:
        raise UserError(f"the cluster map is of {len(cluster_of)} tokens, the vocabulary has {vocabulary}")
    if int(cluster_of.min()) < 0:
        raise UserError(f"the cluster map holds {int(cluster_of.min())}: clusters are numbered from 0")
    count = int(cluster_of.max()) + 1
    empty = (members(cluster_of, count, special)[2] == 0).nonzero().flatten().tolist()
    if empty:
        raise UserError(f"cluster {empty[0]} of {count} has no token that may be substituted: use fewer clusters")
    return count


def read_map(path: str | Path) -> Tensor:
    """A JSON list of the cluster of each token, or one under ``token_to_cluster_map``. Raises ``UserError``."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        value = value["token_to_cluster_map"] if isinstance(value, dict) else value
        return torch.tensor(value, dtype=torch.int64)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is no cluster map: it takes a JSON list of one cluster a token ({error})") from None


def learned_map(vectors: np.ndarray, special: Iterable[int], clusters: int, draw: Draw) -> np.ndarray:
    """int64 ``[V]``: clusters of the word vectors ``[V, D]`` by k-means; special tokens belong to cluster 0 and do not shape it.

    Raises ``UserError`` for more clusters than usable tokens.
    """
    usable = np.setdiff1d(np.arange(len(vectors)), np.array(sorted(set(special)), dtype=int))
    if clusters > len(usable):
        raise UserError(f"clusters={clusters} is more than the {len(usable)} tokens that can be substituted")
    out = np.zeros(len(vectors), dtype=np.int64)
    out[usable] = k_means(vectors[usable].astype(np.float64), clusters, draw)
    return out


def k_means(rows: np.ndarray, clusters: int, draw: Draw) -> np.ndarray:
    """int64 ``[N]``: Lloyd's rounds (at most 50) from a k-means++ start (Arthur & Vassilvitskii 2007), Euclidean. An empty cluster
    takes the row that is farthest from its centre."""
    uniform = draw.uniform("k_means", (clusters,), shared=True).double().numpy()
    centres = np.empty((clusters, rows.shape[1]))
    centres[0] = rows[int(uniform[0] * len(rows))]
    nearest = ((rows - centres[0]) ** 2).sum(1)
    for c in range(1, clusters):
        edges = nearest.cumsum()
        pick = int(np.searchsorted(edges, uniform[c] * edges[-1], side="right")) if edges[-1] > 0 else c
        centres[c] = rows[min(pick, len(rows) - 1)]
        nearest = np.minimum(nearest, ((rows - centres[c]) ** 2).sum(1))
    own = np.full(len(rows), -1)
    squares = (rows**2).sum(1)
    for _ in range(ROUNDS):
        distance = squares[:, None] - 2 * rows @ centres.T + (centres**2).sum(1)
        new = distance.argmin(1)
        for c in np.flatnonzero(np.bincount(new, minlength=clusters) == 0).tolist():
            far = np.where(
                np.bincount(new, minlength=clusters)[new] > 1, distance[np.arange(len(rows)), new], -np.inf
            ).argmax()
            new[far] = c
            distance[far, c] = 0
        if (new == own).all():
            break
        own = new
        sums = np.zeros_like(centres)
        np.add.at(sums, own, rows)
        centres = sums / np.bincount(own, minlength=clusters)[:, None]
    return own


def word_vectors(
    ids: np.ndarray, vocabulary: int, draw: Draw, *, window: int = WINDOW, dimensions: int = DIMENSIONS
) -> np.ndarray:
    """``[V, <= 64]``: truncated SVD of the positive pointwise mutual information of tokens within ``window`` places."""
    table = sparse.csr_matrix((vocabulary, vocabulary), dtype=np.float64)
    for apart in range(1, window + 1):
        if len(ids) > apart:
            pairs = (ids[:-apart].astype(np.int64), ids[apart:].astype(np.int64))
            table = table + sparse.coo_matrix((np.ones(len(pairs[0])), pairs), shape=table.shape).tocsr()
    table = (table + table.T).tocoo()
    total, sums = table.data.sum(), np.asarray(table.tocsr().sum(axis=1)).ravel()
    information = np.log(table.data * total / (sums[table.row] * sums[table.col]))
    kept = information > 0
    positive = sparse.coo_matrix((information[kept], (table.row[kept], table.col[kept])), shape=table.shape).tocsr()
    start = draw.normal("svd", (vocabulary,), shared=True).double().numpy()
    left, strength, _ = sparse_linalg.svds(positive, k=min(dimensions, vocabulary - 2), v0=start)
    return left * np.sqrt(strength)
