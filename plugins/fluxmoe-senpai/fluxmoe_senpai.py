"""Shrink the experts until they come under pressure, as Senpai does with containers.

Weiner et al.: "TMO: Transparent Memory Offloading in Datacenters", ASPLOS 2022. Senpai, TMO's
controller, takes a little memory from a container in each period, as long as the pressure, the
share of time that work waits for memory, is below a target. The amount is

    memory × ratio × max(0, 1 − pressure / target)

so the amount decreases as the pressure approaches the target; above the target, nothing is taken.

Here, the experts are the container: its pressure is the share of time that layers wait for pages,
and the KV cache gets the memory. Differences:

* In TMO, the kernel returns memory when a container faults pages in. Here, the policy must do so:
  above the target, the experts get back the amount that would be taken from them equally far below
  the target.
* The KV cache has its own pressure: a preemption ends the period at once. Memory in use by requests
  is never taken (ensured by the host).
* Pressure is averaged over time within the period, as in the kernel.
"""

from pydantic import BaseModel, ConfigDict, Field

import fluxmoe

__version__ = "0.1.0"
fluxmoe_plugin_api = 1


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    target: float = Field(default=0.1, gt=0, lt=1, description="Share of time that may be waited.")
    ratio: float = Field(default=0.05, gt=0, le=1, description="Share that is taken at most.")
    period: int = Field(default=16, ge=1, description="Steps between two decisions.")


class Senpai(fluxmoe.ArbitrationPolicy):
    """Take memory from the experts while layers hardly wait for pages (TMO, ASPLOS 2022)."""

    def __init__(self, target=0.1, ratio=0.05, period=16):
        self._target, self._ratio, self._period = target, ratio, period
        self.reset()

    def reset(self):
        self._steps = self._preemptions = 0
        self._seconds = self._stalled = 0.0
        self._wish = None

    def split(self, view):
        if view.tokens and view.step_seconds > 0:
            self._steps += 1
            self._seconds += view.step_seconds
            self._stalled += min(view.stall_seconds, view.step_seconds)
        pressed = view.preemptions > self._preemptions
        self._preemptions = view.preemptions
        if self._steps and (self._steps >= self._period or pressed):
            self._wish = self._decide(view, self._stalled / self._seconds)
            self._steps, self._seconds, self._stalled = 0, 0.0, 0.0
        if self._wish is None or sum(self._wish.frames.values()) > view.total_frames:
            return fluxmoe.Split(view.frames)
        return self._wish

    def _decide(self, view, pressure):
        have = view.frames["experts"]
        change = -have * self._ratio * (1 - pressure / self._target)
        change = min(change, have * self._ratio)  # growth at most as fast as shrinking
        least, most = view.bounds["experts"].min, view.bounds["experts"].max
        experts = round(min(max(have + change, least), most))
        kv = max(view.total_frames - experts, view.bounds["kv"].min)
        kv = min(kv, view.bounds["kv"].max, view.total_frames - least)
        experts = min(experts, view.total_frames - kv)
        return fluxmoe.Split(
            {"experts": experts, "kv": kv},
            f"layers waited {pressure:.1%} of the time, {self._target:.0%} is the target",
        )


@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    register("senpai", Senpai, Options)
