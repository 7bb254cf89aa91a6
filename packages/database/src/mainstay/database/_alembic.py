"""What is asked of Alembic: revisions of a schema, and the way from one to another.

Imported when there is something to do, since that takes a tenth of a second. `op`, which revision files import, is one
global of the process: the callers take turns.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import sqlalchemy as sa
from alembic import util
from alembic.autogenerate import compare_metadata, produce_migrations, render_python_code
from alembic.autogenerate.api import AutogenContext
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from mainstay.core import ConfigurationError

if TYPE_CHECKING:
    from mainstay.database.schema import Schema

Steps = Callable[[ScriptDirectory, Any], list[Any]]  # from the current revision, or revisions

_TEMPLATES = Path(__file__).parent / "templates"


def head(schema: Schema) -> str | None:
    """The newest revision; None where there is none yet.

    Raises:
        ConfigurationError: two revisions follow the same one.
    """
    script = _script(schema)
    try:
        return script.get_current_head()
    except CommandError as error:
        heads = ", ".join(sorted(script.get_heads()))
        msg = (
            f"the schema {schema.package} has several newest revisions ({heads}), probably of two branches that were "
            f"merged: let one of them follow the other (`down_revision`) in {schema.migrations}"
        )
        raise ConfigurationError(msg) from error


def knows(schema: Schema, revision: str) -> bool:
    """Whether the schema has such a revision."""
    return revision in {known.revision for known in _script(schema).walk_revisions()}


def sql(schema: Schema, dialect: str) -> str:
    """The statements of a first installation."""
    buffer = io.StringIO()
    context = MigrationContext.configure(
        dialect_name=dialect,
        opts={
            "as_sql": True,
            "output_buffer": buffer,
            "version_table": schema.version_table,
            "fn": _steps(_script(schema), _to_newest),
            "literal_binds": True,
        },
    )
    with Operations.context(context), context.begin_transaction():
        context.run_migrations()
    return buffer.getvalue()


def upgrade(schema: Schema, connection: sa.Connection) -> None:
    """Bring the tables to the newest revision."""
    _run(schema, connection, _to_newest)


def downgrade(schema: Schema, connection: sa.Connection, target: str) -> None:
    """Take the tables back to an older revision.

    Raises:
        ConfigurationError: `target` is no revision before the current one, or a migration between the two has no
            `downgrade`.
    """
    try:
        _run(schema, connection, lambda script, current: script._downgrade_revs(target, current))
    except CommandError as error:
        msg = f"the schema {schema.package} cannot be taken back to revision {target!r}: {error}"
        raise ConfigurationError(msg) from error
    except AttributeError as error:
        if error.name != "downgrade":
            raise
        file = Path(getattr(error.obj, "__file__", "") or "").name
        msg = (
            f"the schema {schema.package} cannot be taken back to revision {target!r}: its migration {file} has no "
            "function downgrade()"
        )
        raise ConfigurationError(msg) from error


def _comparison(schema: Schema, connection: sa.Connection) -> dict[str, Any]:
    """Alembic's options for comparing a database with the schema's own tables only, as they are on its dialect."""

    def ours(item: Any, name: str | None, kind: str, reflected: bool, _to: object) -> bool:  # noqa: FBT001  Alembic calls it so
        if kind == "index" and not reflected and item._ddl_if is not None:  # which Alembic does not look at
            return bool(item._ddl_if._should_execute(sa.schema.CreateIndex(item), item, connection))
        return kind != "table" or name in schema.metadata.tables

    return {
        "compare_type": True,
        "compare_server_default": False,
        "include_object": ours,
    }


def differences(schema: Schema, connection: sa.Connection) -> list[object]:
    """What the tables of the database lack of the metadata, or have beyond it."""
    return list(
        compare_metadata(MigrationContext.configure(connection, opts=_comparison(schema, connection)), schema.metadata)
    )


def code(schema: Schema, connection: sa.Connection) -> tuple[str, str]:
    """The code that brings the tables of the database to those of the metadata, and the code of the way back."""
    context = MigrationContext.configure(connection, opts=_comparison(schema, connection))
    script = produce_migrations(context, schema.metadata)
    return _code(script.upgrade_ops, context), _code(script.downgrade_ops, context)


def write(schema: Schema, message: str, up: str, down: str) -> Path:
    """Write a revision file with the two pieces of code; its path."""
    imports = [
        f"from sqlalchemy.dialects import {name}" for name in ("postgresql", "sqlite") if f"{name}." in up + down
    ]
    written = _script(schema).generate_revision(
        util.rev_id(), message, upgrades=up, downgrades=down, imports="\n".join(imports)
    )
    return Path(cast("Any", written).path)


def _script(schema: Schema) -> ScriptDirectory:
    return ScriptDirectory(str(_TEMPLATES), version_locations=[str(schema.migrations)], messaging_opts={"quiet": True})


def _to_newest(script: ScriptDirectory, current: Any) -> list[Any]:
    return cast("list[Any]", script._upgrade_revs("head", current))


def _steps(script: ScriptDirectory, steps: Steps) -> Callable[[Any, MigrationContext], list[Any]]:
    return lambda current, _context: steps(script, current)


def _run(schema: Schema, connection: sa.Connection, steps: Steps) -> None:
    context = MigrationContext.configure(
        connection,
        opts={
            "version_table": schema.version_table,
            "fn": _steps(_script(schema), steps),
            "transactional_ddl": True,
        },
    )
    with Operations.context(context):
        context.run_migrations()


def _code(operations: Any, context: MigrationContext) -> str:
    code = render_python_code(operations, render_as_batch=True, render_item=_render, migration_context=context)
    # Alembic leaves out the prefix where JSONB is a variant of another type.
    return code.replace("(astext_type=Text())", "(astext_type=sa.Text())")


def _render(kind: str, item: object, _context: AutogenContext) -> str | Literal[False]:
    # A revision file says what the database gets, which must not change when a type of ours does.
    if kind == "type" and isinstance(item, sa.types.TypeDecorator):
        implementation = item.impl_instance
        if type(implementation).__module__.startswith("sqlalchemy."):
            return f"sa.{implementation!r}"
    return False
