"""An endpoint as jobs and recipes name it: `openai:URL#MODEL`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from capfilt.errors import RunError
from capfilt.inference.captioners.endpoint.config import split_address
from capfilt.inference.captioners.vlm.spec import PromptedSpec
from capfilt.inference.config import AnnotateConfig
from capfilt.runs.ledger import fingerprint
from capfilt.runs.run import Run
from capfilt.storage.paths import StoragePath

if TYPE_CHECKING:
    import torch

    from capfilt.inference.captioners.endpoint.server import ServerReport
    from capfilt.inference.interface import Captioner

DECIDED = "captioner"
"""Under which a run's plan has what the server said of itself when the run began."""


class EndpointSpec(PromptedSpec):
    """A model behind a server that speaks the protocol of OpenAI."""

    kind: Literal["endpoint"] = "endpoint"
    url: str
    model: str

    @classmethod
    def of(cls, address: str) -> EndpointSpec:
        """The endpoint of "URL#MODEL". RecipeError for another form, and for a URL that holds a secret."""
        url, model = split_address(address)
        return cls(url=url, model=model)

    def check(self, config: AnnotateConfig) -> None:
        super().check(config)
        config.requests.key()

    def fingerprint(self) -> str:
        """Which model writes, by its name; the server may lie anywhere. `identity` says which version of it."""
        return fingerprint("endpoint", self.model)

    def identity(self, run: Run, config: AnnotateConfig, say: Callable[[str], None]) -> str:
        """Which model writes, by its name and what the server said of it and itself when the run began.

        That is asked once and kept in the run's plan. Whoever goes on is told where the server says something else now.

        Raises:
            RunError: the run begins, and the server cannot be reached or does not answer.
        """
        from capfilt.inference.captioners.endpoint.server import ServerReport, ask_server, listed_now

        record = run.decided(DECIDED) or run.decided_before_fork(DECIDED)
        if record is None:
            report = ask_server(self.url, self.model, config)
        else:
            try:
                report = ServerReport.model_validate_json(record["server"])
            except (KeyError, ValidationError):
                raise RunError(
                    f"the plan of {run.folder} does not say which server writes its texts; use another --out."
                ) from None
            self._compare(report, listed_now, config, say)
        if not report.honours_seeds:
            say(
                f"{self.url} answers otherwise with the same seed: its texts are those of this run, and another run"
                " gets others"
            )
        run.decide(DECIDED, {"server": report.model_dump_json()})
        return fingerprint("endpoint", self.model, report.model_dump(exclude={"honours_seeds"}))

    def _compare(
        self,
        then: ServerReport,
        listed_now: Callable[[str, str, AnnotateConfig], ServerReport],
        config: AnnotateConfig,
        say: Callable[[str], None],
    ) -> None:
        try:
            now = listed_now(self.url, self.model, config)
        except RunError as error:  # a run that is done needs no server
            say(str(error))
            return
        for name, was, value in (("version", then.version, now.version), ("model", then.entry, now.entry)):
            if was != value:
                say(
                    f"{self.url} reports another {name} than when this run began ({was or 'none'}, now"
                    f" {value or 'none'}); what it writes from here on stands beside what it wrote before"
                )

    def open(
        self,
        config: AnnotateConfig,
        seed: int,
        round_: int,
        device: torch.device,
        dtype: torch.dtype,
        cache: StoragePath,
    ) -> Captioner:
        """The captioner, which computes nothing here. `cache`: a folder of the run, for the answers."""
        from capfilt.inference.captioners.endpoint.captioner import EndpointCaptioner

        return EndpointCaptioner((self.url, self.model), config, seed, round_, cache)
