"""What an administrator may set: defaults, then the TOML file, then COLMEIA_… variables."""

import os
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from colmeia.model.errors import Invalid

CONFIG_FILE = Path("/etc/colmeia/colmeia.toml")


def _state_dir() -> Path:
    if os.getuid() == 0:
        return Path("/var/lib/colmeia")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "colmeia"


def _run_dir() -> Path:
    if os.getuid() == 0:
        return Path("/run/colmeia")
    return Path(os.environ.get("XDG_RUNTIME_DIR") or _state_dir() / "run") / "colmeia"


class Settings(BaseSettings):
    """Every setting, with the default an administrator would guess."""

    model_config = SettingsConfigDict(env_prefix="COLMEIA_", extra="forbid", frozen=True)

    state_dir: Path = Field(default_factory=_state_dir, description="Database, images, volumes, logs.")
    run_dir: Path = Field(default_factory=_run_dir, description="Sockets; gone after a reboot.")
    cache_dir: Path | None = Field(default=None, description="Downloaded packages; default: in the state folder.")
    database_url: str = Field(default="", description="Empty: SQLite in the state folder.")
    listen: str = Field(
        default="127.0.0.1:8440", pattern=r"^$|^[^ ]+:\d{1,5}$", description="HTTPS address; empty: local socket only."
    )
    tls_certificate: Path | None = Field(default=None, description="PEM; made by the daemon when absent.")
    tls_key: Path | None = None
    uid_base: int = Field(default=690_000, ge=1000, le=2**31, description="Host users of VMs are numbered from here.")
    keep_events_days: int = Field(default=30, ge=1)
    log_format: str = Field(default="console", pattern="^(console|json)$")

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> "Settings":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: set both or neither")
        return self

    @property
    def socket(self) -> Path:
        return self.run_dir / "api.sock"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _OwnEnvironment(env_settings), TomlConfigSettingsSource(settings_cls)


class _OwnEnvironment(PydanticBaseSettingsSource):
    """The environment without the client's variables (COLMEIA_SERVER, COLMEIA_TOKEN …), which are not the daemon's."""

    def __init__(self, source: PydanticBaseSettingsSource) -> None:
        super().__init__(source.settings_cls)
        self._source = source

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._source.get_field_value(field, field_name)

    def __call__(self) -> dict[str, Any]:
        known = self.settings_cls.model_fields
        return {name: value for name, value in self._source().items() if name in known}


def read_settings(config: Path | None) -> Settings:
    """Read the settings. Raises Invalid (`settings`) that names the file and the setting."""
    file = config or CONFIG_FILE
    if config is not None and not config.is_file():
        raise Invalid("settings", f"The configuration file {config} does not exist.", "Check --config.")
    from_file = type(
        "Settings", (Settings,), {"model_config": SettingsConfigDict(toml_file=file), "__module__": __name__}
    )
    try:
        settings: Settings = from_file()
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(str(part) for part in wrong["loc"])
        what = f"Setting {name} is wrong" if name else "The settings are wrong"
        raise Invalid(
            "settings", f"{what}: {wrong['msg'].removeprefix('Value error, ')}.", f"See {file} and COLMEIA_… variables."
        ) from error
    except ValueError as error:
        raise Invalid("settings", f"{file} is not TOML: {error}.", "Mend the file.") from error
    return settings
