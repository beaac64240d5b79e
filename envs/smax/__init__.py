"""SMAX, StarCraft-like battles in JAX: an engine of our own for JaxMARL's game, ten times as fast, with tasks as data."""

from envs.smax.game import Smax
from envs.smax.scenarios import RACES, SCENARIOS, drift, make
from envs.smax.types import UNIT_TYPES, SmaxParams, SmaxRecord, SmaxState, UnitStatistics

__all__ = ["RACES", "SCENARIOS", "UNIT_TYPES", "Smax", "SmaxParams", "SmaxRecord", "SmaxState", "UnitStatistics", "drift", "make"]
