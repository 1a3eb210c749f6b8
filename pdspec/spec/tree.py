"""Draft trees: how a request names one, which nodes are worth verifying, and where their rows stand.

    chain(k)                        k nodes, one below the other
    static(name)                    a published shape (``shapes.py``), or one that the deployment has under that name
    static(4x2x1)                   a shape: the root has 4 children, each has 2, each of those 1
    static(0 1 0.0 0.1)             a shape node by node: each as the child ranks that lead to it
    dynamic(depth, top_k, nodes)    EAGLE-2: the ``nodes`` best of what ``depth`` rounds of top-k make

In all arrays a tree of N nodes is its ``parents`` [N], -1 for the root, parents before children; a chain is a tree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pdspec.errors import ConfigError, InvalidRequest, UnknownName
from pdspec.spec.protocol import Draft
from pdspec.spec.shapes import PUBLISHED

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

MAX_NODES = 256  # of any tree that a request may ask for
MAX_TOP_K = 64

_PATH = r"[0-9]{1,3}(\.[0-9]{1,3})*"
_REMEDY = "use chain(k), static(name), static(AxBxC) or dynamic(depth,top_k,nodes)"


@dataclass(frozen=True, kw_only=True)
class ChainTree:
    """``depth`` nodes, one below the other."""

    depth: int

    @property
    def max_nodes(self) -> int:
        """N."""
        return self.depth


@dataclass(frozen=True, kw_only=True)
class StaticTree:
    """A fixed shape: node i is its parent's child of rank ``ranks[i]`` (0 the best)."""

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def max_nodes(self) -> int:
        """N."""
        return len(self.parents)

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return int(depths(np.array(self.parents, np.int32)).max())


@dataclass(frozen=True, kw_only=True)
class DynamicTree:
    """``depth`` rounds, each giving the ``top_k`` best nodes ``top_k`` children; the ``nodes`` best of all stay."""

    depth: int
    top_k: int
    nodes: int

    @property
    def max_nodes(self) -> int:
        """N."""
        return self.nodes


TreeSpec = ChainTree | StaticTree | DynamicTree


def parse_tree(text: str) -> TreeSpec:
    """The tree that ``text`` names. Raises UnknownName for a kind or published shape that does not exist,
    InvalidRequest for wrong arguments, both naming the field ``tree`` and the remedy."""
    match = re.fullmatch(r"\s*(\w+)\s*\(([^()]*)\)\s*", text)
    if match is None:
        raise InvalidRequest(f"{text!r} is not a tree", field="tree", remedy=_REMEDY)
    kind, arguments = match[1], [part.strip() for part in match[2].split(",")]
    if kind == "chain":
        (depth,) = _numbers(text, arguments, ("k",), (MAX_NODES,))
        return ChainTree(depth=depth)
    if kind == "dynamic":
        limits = (MAX_NODES, MAX_TOP_K, MAX_NODES)
        depth, top_k, nodes = _numbers(text, arguments, ("depth", "top_k", "nodes"), limits)
        return DynamicTree(depth=depth, top_k=top_k, nodes=nodes)
    if kind == "static":
        return _static(text, arguments[0] if len(arguments) == 1 else "")
    raise UnknownName(f"no tree of kind {kind!r}", field="tree", remedy=_REMEDY)


def read_shapes(files: Mapping[str, str]) -> dict[str, str]:
    """The shapes in JSON lists of paths ([[0], [1], [0, 0]], as Medusa and EAGLE publish theirs) by name, spelled out
    as ``static(...)`` takes them. Raises ConfigError naming the file or a name that is taken."""
    shapes = {}
    for name, path in files.items():
        if name in PUBLISHED or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"a tree cannot be called {name!r}", field="trees", remedy="choose another name")
        try:
            paths = json.loads(Path(path).read_text(encoding="utf-8"))
            if not all(type(rank) is int for one in paths for rank in one):
                raise TypeError("ranks are whole numbers")
            shape = " ".join(".".join(map(str, one)) for one in paths)
            shapes[name] = "1" if shape == "0" else shape
            parse_tree(f"static({shapes[name]})")
        except (OSError, TypeError, ValueError, InvalidRequest, UnknownName) as error:
            raise ConfigError(f"{path} holds no tree: {error}", field="trees",
                              remedy="write a JSON list of paths of child ranks: [[0], [1], [0, 0]]") from error
    return shapes


def spelled_out(text: str, shapes: Mapping[str, str]) -> str:
    """``text``, with ``static(name)`` spelled out where ``shapes`` has the name: so that only a deployment, and no
    request, says which files are read, and the other side of a handoff needs none of them."""
    match = re.fullmatch(r"\s*static\s*\(\s*(\w+)\s*\)\s*", text)
    return f"static({shapes[match[1]]})" if match and match[1] in shapes else text


def depths(parents: Ints) -> Ints:
    """Depth of each node, 1 below the root. Raises ValueError for a child before its parent."""
    result = np.zeros(len(parents), np.int32)
    for node, parent in enumerate(parents.tolist()):
        if not -1 <= parent < node:
            raise ValueError(f"node {node} stands before its parent {parent}")
        result[node] = 1 if parent < 0 else result[parent] + 1
    return result


def ancestor_lists(parents: Ints) -> Ints:
    """[N, A]: the path of each node below the root, itself last, padded with -1; A is the largest depth."""
    levels = depths(parents)
    result = np.full((len(parents), int(levels.max(initial=0))), -1, np.int32)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            result[node] = result[parent]
        result[node, levels[node] - 1] = node
    return result


@dataclass(frozen=True, kw_only=True)
class TreeRows:
    """The target rows of one verification, row 0 the root's, row 1 + i node i's, the branch's last; int32, as
    ForwardBatch wants them. R = 1 + N + M."""

    positions: Ints  # [R]
    slots: Ints  # [R]
    prefix_len: Ints  # [R]
    ancestors: Ints  # [R, A] KV slots, -1 pads; A is the deeper tree's depth


def tree_rows(draft: Draft, base_slot: int, root_position: int) -> TreeRows:
    """Where the rows stand: the root, a plain decode row, writes slot ``base_slot``; node i writes base_slot + 1 + i,
    and sees the slots up to the root's and then its own path."""
    _, parents = draft.rows
    rows = np.arange(1 + len(parents), dtype=np.int32)
    levels = np.concatenate([np.zeros(1, np.int32), depths(parents)])
    paths = ancestor_lists(parents)
    ancestors = np.full((len(rows), paths.shape[1]), -1, np.int32)
    ancestors[1:] = np.where(paths < 0, -1, paths + np.int32(base_slot + 1))
    return TreeRows(
        positions=levels + np.int32(root_position), slots=rows + np.int32(base_slot),
        prefix_len=np.full(len(rows), base_slot + 1, np.int32), ancestors=ancestors,
    )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A part of a tree that is a tree again: old node indices ``kept`` [M], ascending, and the new ``parents`` [M]."""

    kept: Ints
    parents: Ints


def select_nodes(parents: Ints, scores: Floats, count: int) -> Selection:
    """The ``count`` nodes of best cumulative score, closed under parents. A node counts for no more than its parent;
    ties go to the shallower node, then to the lower index. Raises ValueError for a NaN score."""
    levels = depths(parents)
    if np.isnan(scores).any():
        raise ValueError("nodes without a score cannot be ranked")
    capped = np.array(scores, np.float32)
    for node, parent in enumerate(parents.tolist()):
        if parent >= 0:
            capped[node] = min(capped[node], capped[parent])
    order = np.lexsort((np.arange(len(parents)), levels, -capped))  # the last key counts most
    kept = np.sort(order[: max(count, 0)]).astype(np.int32)
    renumbered = np.full(len(parents) + 1, -1, np.int32)  # the last entry is the root's: index -1
    renumbered[kept] = np.arange(len(kept), dtype=np.int32)
    return Selection(kept=kept, parents=renumbered[parents[kept]])


def prune(draft: Draft, count: int) -> Draft:
    """The ``count`` nodes of a draft that are most likely to be accepted, as a draft."""
    if count >= draft.num_nodes:
        return draft
    return draft.part(select_nodes(draft.parents, draft.survival, count).kept)


def _numbers(text: str, arguments: Sequence[str], names: Sequence[str], limits: Sequence[int]) -> list[int]:
    if len(arguments) != len(names) or not all(re.fullmatch(r"[0-9]{1,9}", argument) for argument in arguments):
        raise InvalidRequest(f"{text!r} needs the whole numbers {', '.join(names)}", field="tree", remedy=_REMEDY)
    values = [int(argument) for argument in arguments]
    for name, value, limit in zip(names, values, limits, strict=True):
        if not 1 <= value <= limit:
            raise InvalidRequest(f"{name} is {value} in {text!r}", field="tree", remedy=f"keep {name} in 1..{limit}")
    return values


def _static(text: str, shape: str) -> StaticTree:
    shape = PUBLISHED.get(shape, shape)
    if re.fullmatch(rf"{_PATH}( +{_PATH})+", shape):
        return _from_paths(text, [tuple(map(int, path.split("."))) for path in shape.split()])
    if not re.fullmatch(r"[0-9]{1,4}(x[0-9]{1,4})*", shape):
        remedy = f"use a shape like 4x2x1, or {', '.join(PUBLISHED)}"
        raise UnknownName(f"no static tree {shape!r}", field="tree", remedy=remedy)
    level: list[tuple[int, ...]] = [()]
    paths: list[tuple[int, ...]] = []
    for width in map(int, shape.split("x")):
        if width < 1 or len(paths) + len(level) * width > MAX_NODES:
            remedy = f"at least 1 child a level, at most {MAX_NODES} nodes"
            raise InvalidRequest(f"{text!r} cannot be verified", field="tree", remedy=remedy)
        level = [(*path, rank) for path in level for rank in range(width)]
        paths.extend(level)
    return _from_paths(text, paths)


def _from_paths(text: str, paths: Sequence[tuple[int, ...]]) -> StaticTree:
    """Any order of nodes. A child of rank k without its sibling of rank k - 1 is refused: what is drawn from q without
    replacement is judged in the order of the draws, all of them."""
    ordered = sorted(paths, key=lambda path: (len(path), path))
    index = {path: node for node, path in enumerate(ordered)}
    alone = [
        path for path in ordered
        if (len(path) > 1 and path[:-1] not in index) or (path[-1] > 0 and (*path[:-1], path[-1] - 1) not in index)
    ]
    if alone or len(index) < len(paths) or len(paths) > MAX_NODES:
        where = f" at {'.'.join(map(str, alone[0]))}" if alone else ""
        raise InvalidRequest(f"{text[:80]!r} is no tree{where}", field="tree",
                             remedy=f"name each of at most {MAX_NODES} nodes once, and its parent and the siblings of"
                                    " lower rank, too")
    parents = tuple(index[path[:-1]] if len(path) > 1 else -1 for path in ordered)
    return StaticTree(parents=parents, ranks=tuple(path[-1] for path in ordered))
