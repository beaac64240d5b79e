"""Deterministic weights and data on which the networks' published reference implementations were run in float64."""

from typing import Any

import numpy as np

NUM_AGENTS, NUM_ACTIONS, STATE_SIZE, ROWS = 3, 4, 5, 2

STATE = np.array([[np.sin(0.37 * (STATE_SIZE * m + j) + 0.2) for j in range(STATE_SIZE)] for m in range(ROWS)])
CHOSEN_Q = np.array([[np.cos(0.53 * (NUM_AGENTS * m + n)) for n in range(NUM_AGENTS)] for m in range(ROWS)])
GREEDY_Q = CHOSEN_Q + np.array([[0, 0.5, 1], [0.25, 0, 0]])
ACTIONS = np.eye(NUM_ACTIONS)[np.array([[0, 3, 1], [2, 2, 0]])]


def weight(units: int, inputs: int, role: float) -> np.ndarray:
    """`W[o, i] = sin(0.7 o + 1.3 i + role) / sqrt(inputs)`, one-based, as `[inputs, units]`."""
    o, i = np.arange(1, units + 1)[None, :], np.arange(1, inputs + 1)[:, None]
    return np.sin(0.7 * o + 1.3 * i + role) / np.sqrt(inputs)


def bias(units: int, role: float) -> np.ndarray:
    """`b[o] = 0.1 cos(0.9 o + role)`, one-based."""
    return 0.1 * np.cos(0.9 * np.arange(1, units + 1) + role)


def dense(units: int, inputs: int, role: float) -> dict[str, Any]:
    """The parameters of an affine layer."""
    return {"kernel": weight(units, inputs, role), "bias": bias(units, role)}


def stacked_dense(units: int, inputs: int, roles: list[float]) -> dict[str, Any]:
    """The parameters of affine layers side by side."""
    layers = [dense(units, inputs, role) for role in roles]
    return {name: np.stack([layer[name] for layer in layers]) for name in ("kernel", "bias")}


def gru(units: int, inputs: int) -> dict[str, Any]:
    """A GRU's parameters from matrices stacked as reset, update, new over `3 units` rows."""
    return {
        "input": {"kernel": weight(3 * units, inputs, 3).reshape(inputs, 3, units), "bias": bias(3 * units, 5).reshape(3, units)},
        "hidden_kernel": weight(3 * units, units, 4).reshape(units, 3, units),
        "hidden_bias": bias(3 * units, 6).reshape(3, units),
    }
