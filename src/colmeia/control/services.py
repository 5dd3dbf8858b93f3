"""What the control functions work with. Built once by the daemon and handed down; nobody looks anything up."""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from colmeia.control.operations import Operations
from colmeia.engine.interface import Engine
from colmeia.model.host import HostFacts
from colmeia.storage.interface import Images, VolumePool
from colmeia.store.database import Database


@dataclass(frozen=True)
class Services:
    """The house's mechanisms."""

    database: Database
    operations: Operations
    engine: Engine
    volumes: VolumePool
    images: Images
    facts: HostFacts
    uid_base: int
    vm_dir: Path


def now() -> datetime:
    """The present, with its time zone: the only clock that is written down."""
    return datetime.now(UTC)
