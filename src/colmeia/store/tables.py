"""The tables. A noun is one row: the columns that are searched by, and its whole model as a JSON document.

The document is exactly what the API shows, so listing a thousand objects parses nothing. Index columns are derived
from the model by `colmeia.store.documents`; nothing else writes them.
"""

from sqlalchemy import (
    Boolean,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

projects = Table(
    "projects",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("document", Text, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("name", String(63), nullable=False, unique=True),
    Column("secret_sha256", String(64), nullable=False, unique=True),
    Column("document", Text, nullable=False),
)

images = Table(
    "images",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("project", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("state", String(20), nullable=False),
    Column("document", Text, nullable=False),
    UniqueConstraint("project", "name"),
)

vms = Table(
    "vms",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("project", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("state", String(20), nullable=False),
    Column("uid", Integer, nullable=False, unique=True),
    Column("document", Text, nullable=False),
    UniqueConstraint("project", "name"),
)

volumes = Table(
    "volumes",
    metadata,
    Column("id", String(96), primary_key=True),
    Column("vm_id", String(16), ForeignKey("vms.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("image_id", String(16), ForeignKey("images.id"), nullable=True, index=True),
    Column("disk", String(63), nullable=False),
)

operations = Table(
    "operations",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("project", String(63), nullable=False),
    Column("state", String(20), nullable=False, index=True),
    Column("target_id", String(16), nullable=False, index=True),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("order", Integer, nullable=False, unique=True),
    Column("document", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("project", String(63), nullable=False),
    Column("kind", String(40), nullable=False),
    Column("object_id", String(16), nullable=False),
    Column("document", Text, nullable=False),
    Index("ix_events_object_kind_at", "object_id", "kind", "at"),
    sqlite_autoincrement=True,
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("caller", String(80), primary_key=True),
    Column("key", String(200), primary_key=True),
    Column("request_sha256", String(64), nullable=False),
    Column("operation_id", String(16), nullable=False),
    Column("at", DateTime(timezone=True), nullable=False),
)
