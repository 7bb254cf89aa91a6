"""Prometheus."""

import contextlib
import json
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from mainstay_servers.install import find
from mainstay_servers.process import Server

_CONFIG = """\
global:
  scrape_interval: {seconds:g}s
  evaluation_interval: {seconds:g}s
rule_files: ["{directory}/*.rules.yml"]
scrape_configs:
  - job_name: {job}
    metrics_path: {path}
    static_configs:
      - targets: {targets}
"""


class Prometheus(Server):
    """A Prometheus that scrapes and evaluates every second.

    Args:
        job: the name of what is scraped.
        targets: its addresses, `host:port` each.
        rules: the text of files of rules.
        path: where each target has its metrics.
    """

    name = "prometheus"

    def __init__(self, job: str, targets: Sequence[str], rules: Sequence[str] = (), path: str = "/metrics") -> None:
        super().__init__()
        self._job = job
        self._targets = list(targets)
        self._rules = rules
        self._path = path

    @property
    def url(self) -> str:
        """The address."""
        return f"http://127.0.0.1:{self.port}"

    def prepare(self) -> None:
        """Write the configuration."""
        find("prometheus")
        for number, text in enumerate(self._rules):
            (self.directory / f"{number}.rules.yml").write_text(text)
        config = _CONFIG.format(
            seconds=1, directory=self.directory, job=self._job, path=self._path, targets=json.dumps(self._targets)
        )
        (self.directory / "prometheus.yml").write_text(config)

    def command(self) -> Sequence[str]:
        """Return the command of the server."""
        return [
            find("prometheus"),
            f"--config.file={self.directory}/prometheus.yml",
            f"--storage.tsdb.path={self.directory}/data",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--enable-feature=exemplar-storage",
        ]

    def ready(self) -> bool:
        """Say whether it has read its configuration and answers."""
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:  # noqa: S310  our own
            return bool(answer.status == 200)  # noqa: PLR2004  of HTTP
        return False

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of its API, such as `ask("alerts")` or `ask("query", query="up")`."""
        url = f"{self.url}/api/v1/{path}?{urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310  our own
            return json.load(answer)["data"]
