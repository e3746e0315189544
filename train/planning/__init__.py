"""What a run will take, before it is queued: memory, time, and the layouts that fit."""

from train.planning.cluster import Cluster, load_cluster
from train.planning.plan import Plan, plan

__all__ = ["Cluster", "Plan", "load_cluster", "plan"]
