"""The one SQL database of a hub: engine, transactions, schema and its migrations.

Rooms declare their tables on ``metadata``; ``migrate`` brings a database to the newest schema.
"""

from fabric.sql.database import Database
from fabric.sql.migrate import is_current, migrate
from fabric.sql.offload import Offload
from fabric.sql.prepared import Prepared, Query
from fabric.sql.schema import UtcTime, metadata, utc_now

__all__ = [
    "Database",
    "Offload",
    "Prepared",
    "Query",
    "UtcTime",
    "is_current",
    "metadata",
    "migrate",
    "utc_now",
]
