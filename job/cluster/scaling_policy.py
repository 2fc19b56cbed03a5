"""How many workers an elastic run may have just now, on a cluster that others use too."""

from typing import Any

from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ResizeDecision, ScalingDecision

from job.cluster.connection import free_resources
from job.cluster.resources import Placement


class FreeResourceScalingPolicy(ElasticScalingPolicy):
    """Ray's own policy, which counts what the nodes have, bounded by what of it is free.

    Without the bound a node that other work fills would end a group that trains, for a larger one that
    never finds room.
    """

    def __init__(self, scaling_config: ScalingConfig, placement: Placement) -> None:
        super().__init__(scaling_config)
        self.placement = placement
        self.tried = False  # a group was wanted, and none has stood since
        self.held: int | None = None  # workers whose place is the run's own; None: no bound

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Asked by Ray when a group is to start: at first without the bound, since an old one may not have gone."""
        self.held = 0 if self.tried else None
        decision = super().make_decision_for_non_running_worker_group()
        self.tried = self.tried or isinstance(decision, ResizeDecision)
        return decision

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Asked by Ray while a group trains."""
        self.tried, self.held = False, worker_group_state.num_workers
        return super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        counted = super()._count_possible_workers(reserved_resources)
        return counted if self.held is None else min(counted, self.held + self.placement.room(free_resources()))
