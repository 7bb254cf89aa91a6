"""Apache Kafka in KRaft mode: one process that is broker and controller."""

import base64
import functools
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from mainstay_servers.install import find, kafka_jars, one_at_a_time
from mainstay_servers.process import Server, ServerError, free_port


class Kafka(Server):
    """A single-node Kafka. `address` is the bootstrap address, `127.0.0.1:port`."""

    name = "kafka"
    stop_signal = signal.SIGTERM

    def __init__(self) -> None:
        super().__init__()
        self._controller_port = free_port()

    @property
    def address(self) -> str:
        """The bootstrap address."""
        return f"127.0.0.1:{self.port}"

    # ------------------------------------------------------------------------------------------------ for subclasses
    def archive_options(self) -> Sequence[str]:
        """Return what tells Java where loaded classes are kept."""
        archive = _archive()
        return [] if archive is None else [f"-XX:SharedArchiveFile={archive}"]

    def listeners(self) -> dict[str, int]:
        """Return the port of each listener for clients."""
        return {"PLAINTEXT": self.port}

    def more_properties(self) -> str:
        """Return further lines of `server.properties`."""
        return ""

    def more_format_arguments(self) -> Sequence[str]:
        """Return further arguments of `StorageTool format`."""
        return []

    def ready(self) -> bool:
        """Say whether all listeners do: they open one after the other."""
        return all(map(self.listening, self.listeners().values()))

    def prepare(self) -> None:
        """Write the configuration and format the log directory."""
        kafka_jars()
        properties = self.directory / "server.properties"
        listeners = ",".join(f"{name}://127.0.0.1:{port}" for name, port in self.listeners().items())
        properties.write_text(
            f"""\
process.roles=broker,controller
node.id=1
listeners={listeners},CONTROLLER://127.0.0.1:{self._controller_port}
advertised.listeners={listeners}
controller.listener.names=CONTROLLER
controller.quorum.bootstrap.servers=127.0.0.1:{self._controller_port}
log.dirs={self.directory / "data"}
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
# A killed broker registers again only when its session has ended: with the defaults a restart takes 12 s. With one
# second a broker on a busy machine lost it again and again, and with it all leaders and coordinators.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=300
# How often an idle controller writes that there is nothing to write; twice a second is a quarter of what it does.
metadata.max.idle.interval.ms=5000
{self.more_properties()}
""",
        )
        # As `random-uuid` of the tool makes one, without a Java machine of its own for it.
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        tool = ("kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", "--standalone")
        self.run_once(*self._java(), *tool, *self.more_format_arguments(), "-c", str(properties))

    def move(self, port: int) -> None:
        """Have it listen at another port, and say so to its clients, from its next start on; it must not run."""
        properties = self.directory / "server.properties"
        properties.write_text(properties.read_text().replace(f"//127.0.0.1:{self.port}", f"//127.0.0.1:{port}"))
        self.port = port

    def command(self) -> Sequence[str]:
        """Return the command of the broker."""
        return [*self._java("-Xms256m", "-Xmx512m"), "kafka.Kafka", str(self.directory / "server.properties")]

    def _java(self, *heap: str) -> list[str]:
        return [
            *(find("java"), *heap, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", *self.archive_options()),
            *("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", f"{kafka_jars()}/*"),
        ]


class _Recorded(Kafka):
    """A Kafka that writes the classes it has loaded to a file when it ends."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def archive_options(self) -> Sequence[str]:
        """See `Kafka`."""
        return []

    def command(self) -> Sequence[str]:
        """See `Kafka`."""
        java, *others = super().command()
        return [java, f"-XX:ArchiveClassesAtExit={self._file}", *others]

    def end(self) -> None:
        """Let it write the file."""
        assert self._process is not None  # noqa: S101 - it was started
        self._process.terminate()
        self._process.wait(timeout=120)


@functools.cache
def _archive() -> Path | None:
    """Return the file with Kafka's classes as this Java keeps them: loading them takes half of a start.

    It is made once per user and Java, by a Kafka that starts for it. Java passes over a file that does not suit it.
    None where it cannot be made: each start takes longer then.
    """
    jars, java = kafka_jars(), Path(find("java")).resolve().stat()
    file = jars.with_name(f"{jars.name}-{java.st_size:x}-{java.st_mtime_ns:x}.jsa")
    with one_at_a_time():
        if file.exists():
            return file
        try:
            with tempfile.TemporaryDirectory(dir=jars.parent) as scratch:
                fresh = Path(scratch) / file.name
                with _Recorded(fresh) as kafka:
                    kafka.end()
                fresh.rename(file)  # whole or not at all
        except (OSError, ServerError, subprocess.TimeoutExpired):
            return None
    return file
