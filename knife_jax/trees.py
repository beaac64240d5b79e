"""Nested dicts of arrays as flat ones, whose names are paths in JSON, and back."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util


def flat(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """Nested dicts of arrays as one dict; an empty one is kept as an array under the name null."""
    leaves: dict[Any, Any] = traverse_util.flatten_dict(tree, keep_empty_nodes=True)
    empty = traverse_util.empty_node
    return {json.dumps([*path, None] if leaf is empty else path): np.zeros(0) if leaf is empty else leaf for path, leaf in leaves.items()}


def nested(given: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The nested dicts that `flat` was given."""
    paths = {tuple(json.loads(name)): values for name, values in given.items()}
    leaves = {path[:-1] if path[-1] is None else path: {} if path[-1] is None else values for path, values in paths.items()}
    return traverse_util.unflatten_dict(leaves)
