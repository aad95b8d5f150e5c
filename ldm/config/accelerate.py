"""What the launcher reads of a configuration for ``accelerate launch``."""

from __future__ import annotations

from pydantic import ConfigDict

from ldm.config.section import Count, Section


class Accelerate(Section):
    """How many processes there are to be, and on what; the other keys are accelerate's own."""

    model_config = ConfigDict(extra="ignore", strict=True)

    num_processes: Count
    """Over all machines."""
    num_machines: Count = 1
    use_cpu: bool = False
    gpu_ids: str | None = None
    """Of each machine, with commas between; ``all`` or null: all that there are."""
    main_process_port: int | None = None

    @property
    def processes_here(self) -> int:
        """On each machine."""
        return max(1, self.num_processes // self.num_machines)
