"""For tests: handlers in memory, by example and under faults, and the contract that every transport keeps.

`async with in_memory(events) as rehearsal:` runs the handlers of routers without a server, keeps what was published,
and `await rehearsal.settled()` returns when everything has been handled.

`await scenario(events).given(…).when(…).then(published=[…])` is one example of what handlers do.

`simulate(Orders, seeds=range(100))` runs handlers in a world in which what can go wrong does, and tells the smallest
story in which they are wrong.

`TransportContract` is what the transports of this package are tested with. Subclass it and say how a service is
configured: it shows whether Kafka as you run it, or your database, keeps what the documentation promises.
"""

from mainstay.events.testing._contract import Noted, Paid, Placed, TransportContract
from mainstay.events.testing._rehearsal import Rehearsal, in_memory, metadata_of
from mainstay.events.testing._scenario import Scenario, scenario
from mainstay.events.testing._simulation import (
    NotHandledError,
    OrderError,
    Simulation,
    SimulationFailedError,
    simulate,
)

__all__ = [
    "NotHandledError",
    "Noted",
    "OrderError",
    "Paid",
    "Placed",
    "Rehearsal",
    "Scenario",
    "Simulation",
    "SimulationFailedError",
    "TransportContract",
    "in_memory",
    "metadata_of",
    "scenario",
    "simulate",
]
