"""The module that puts workflows into an App."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any, ClassVar

from mainstay.core import App, ConfigurationError, Module
from mainstay.database import Database, DatabaseModule
from mainstay.workflow._payloads import Payloads
from mainstay.workflow._retention import Retention
from mainstay.workflow._threads import Threads
from mainstay.workflow.approval import AnyApproval
from mainstay.workflow.codec import PayloadCodec
from mainstay.workflow.engine import WorkflowEngine
from mainstay.workflow.router import WorkflowRouter
from mainstay.workflow.settings import WorkflowSettings
from mainstay.workflow.step import AnyStep
from mainstay.workflow.tables import SCHEMA
from mainstay.workflow.workflow import AnyWorkflow

__all__ = ["WorkflowModule"]

_NAME = re.compile(r"[A-Za-z0-9-]{1,40}")


class WorkflowModule(Module[WorkflowSettings, WorkflowRouter | PayloadCodec]):
    """`WorkflowModule.for_root()` yields the `WorkflowEngine`; `WorkflowModule.for_feature(flows)` adds a router.

    `for_feature` also takes the one `PayloadCodec` through which payloads are stored.

    Every process of the App can start runs and wait for results; those that serve execute them.
    """

    name: ClassVar[str] = "workflow"

    def requires(self) -> Sequence[type[Module[Any, Any]]]:
        """The database."""
        return (DatabaseModule,)

    def yields(self) -> Sequence[type]:
        """The engine."""
        return (WorkflowEngine,)

    def functions(self) -> Sequence[Callable[..., Any]]:
        """The functions of the workflows, of the steps with their compensations and probes, and of the approvals."""
        workflows, steps = self._collect()
        return [
            *(workflow.function for workflow in workflows.values()),
            *(function for step in steps.values() for function in step.functions()),
            *(function for approval in self._approvals(steps).values() for function in approval.functions()),
        ]

    def check(self) -> None:
        """Refuse definitions that contradict themselves or each other.

        Raises:
            ConfigurationError: a step without a compensation, a name that two routers have, an annotation that names
                nothing; the message says what to write.
        """
        _, steps = self._collect()
        self._approvals(steps)
        self._payloads()

    def _routers(self) -> list[WorkflowRouter]:
        return [part for part in self.parts if isinstance(part, WorkflowRouter)]

    def _payloads(self) -> Payloads:
        codecs = [part for part in self.parts if isinstance(part, PayloadCodec)]
        if len(codecs) > 1:
            names = " and ".join(codec.name for codec in codecs)
            msg = f"two payload codecs, {names}: an App has one, which reads what its keys of before have written"
            raise ConfigurationError(msg)
        if codecs and not _NAME.fullmatch(codecs[0].name):
            msg = f"the name of a payload codec is letters, digits and '-', not {codecs[0].name!r}"
            raise ConfigurationError(msg)
        return Payloads(codecs[0] if codecs else None)

    def _collect(self) -> tuple[dict[tuple[str, int], AnyWorkflow], dict[str, AnyStep]]:
        workflows: dict[tuple[str, int], AnyWorkflow] = {}
        steps: dict[str, AnyStep] = {}
        for router in self._routers():
            try:
                router.check()
            except TypeError as error:
                raise ConfigurationError(str(error)) from error
            for key, workflow in router.workflows.items():
                if key in workflows:
                    msg = f"two routers have version {key[1]} of workflow {key[0]!r}: a name is of one workflow"
                    raise ConfigurationError(msg)
                workflows[key] = workflow
            for name, step in router.steps.items():
                if name in steps:
                    msg = (
                        f"two routers have a step {name} ({_where(steps[name])} and {_where(step)}): records know a "
                        "step by its name, so rename one of the functions"
                    )
                    raise ConfigurationError(msg)
                steps[name] = step
        return workflows, steps

    def _approvals(self, steps: Mapping[str, AnyStep]) -> dict[str, AnyApproval]:
        approvals: dict[str, AnyApproval] = {}
        for router in self._routers():
            for name, approval in router.approvals.items():
                if name in approvals:
                    msg = f"two routers have an approval {name!r}: decisions name it, so rename one of them"
                    raise ConfigurationError(msg)
                step = approval.on_escalation
                if step is not None and steps.get(step.name) is not step:
                    msg = f"approval {name!r} escalates by step {step.name}, whose router is not part of this App"
                    raise ConfigurationError(msg)
                approvals[name] = approval
        return approvals

    def describe(self) -> Mapping[str, Sequence[str]]:
        """The workflows, the steps with what is done about a failure, and the names of whatever else there is."""
        workflows, steps = self._collect()
        routers = self._routers()
        others = {
            "signals": sorted(name for router in routers for name in router.signals),
            "values": sorted(name for router in routers for name in router.values),
            "approvals": sorted(name for router in routers for name in router.approvals),
            "codec": [part.name for part in self.parts if isinstance(part, PayloadCodec)],
        }
        return {
            "workflows": [_planned(workflow) for _, workflow in sorted(workflows.items())],
            "steps": [_said(step) for _, step in sorted(steps.items())],
            **{kind: names for kind, names in others.items() if names},
        }

    async def inspect(self, app: App) -> Sequence[str]:
        """Missing rights on the tables."""
        return await app.get(Database).missing_rights(SCHEMA.metadata.sorted_tables)

    @asynccontextmanager
    async def running(self, app: App) -> AsyncGenerator[Sequence[object], None]:
        """Yield the engine, with every router bound to it; its worker runs only while the App serves."""
        database = app.get(Database)
        await database.ensure_schema(SCHEMA)
        workflows, steps = self._collect()
        approvals = self._approvals(steps)
        engine = WorkflowEngine(
            database=database,
            clock=app.clock,
            settings=self.settings,
            workflows=workflows,
            steps=steps,
            payloads=self._payloads(),
            approvals=approvals,
        )
        app.serve("worker", engine.worker.work)
        app.serve("retention", Retention(database=database, settings=self.settings).work)
        threads = Threads(self.settings.max_threads)
        with ExitStack() as bound:
            bound.callback(threads.close)
            for router in self._routers():
                bound.enter_context(router.binding.to(engine))
            for step in steps.values():
                bound.enter_context(step.filled_by(app, threads))
            for approval in approvals.values():
                bound.enter_context(approval.filled_by(app))
            try:
                yield [engine]
            finally:
                await engine.close()


def _where(step: AnyStep) -> str:
    return f"{step.function.__module__}.{step.name}"


def _planned(workflow: AnyWorkflow) -> str:
    steps = "" if workflow.plan is None else f": {workflow.plan}"
    return f"{workflow.name} version {workflow.version}{steps}"


def _said(step: AnyStep) -> str:
    policy = step.policy
    said = [f"{policy.retry.attempts} attempts"]
    if policy.timeout_seconds is not None:
        said.append(f"{policy.timeout_seconds:g} s each")
    said.append("transactional" if policy.transactional else f"unknown: {policy.on_unknown}")
    if policy.exhausted == "park":
        said.append("then parked")
    said.extend(policy.uncompensated)
    return f"{step.name}: {', '.join(said)}"
