"""A stand-in of Globus Groups: the routes that a member's token may ask."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from fabric.testing.globus.calls import Refused, token_of_bearer
from fabric.testing.globus.directory import GROUPS_SCOPE, AuthDirectory, Group

_SERVER = "groups.api.globus.org"
_SCOPES = (GROUPS_SCOPE, "urn:globus:auth:scope:groups.api.globus.org:all")

Json = dict[str, Any]


class GroupsRoutes:
    """The answers of Groups over a directory."""

    def __init__(self, directory: AuthDirectory) -> None:
        self._directory = directory

    def mine(self, request: Request, statuses: str = "active") -> list[Json]:
        """Return the caller's groups."""
        grant = token_of_bearer(self._directory, request, _SERVER, _SCOPES)
        documents = [self._document(one, grant.subject) for one in self._directory.groups()]
        return [
            {**document, "my_memberships": memberships}
            for document in documents
            if (
                memberships := [
                    one
                    for one in document["my_memberships"]
                    if one["status"] in statuses.split(",")
                ]
            )
        ]

    def one(self, request: Request, group_id: str) -> Json:
        """Return a group that the caller may see."""
        grant = token_of_bearer(self._directory, request, _SERVER, _SCOPES)
        group = next((one for one in self._directory.groups() if one.id == group_id), None)
        if group is None:
            raise Refused(404, "group_not_found")
        document = self._document(group, grant.subject)
        if group.visibility == "private" and not document["my_memberships"]:
            raise Refused(403, "forbidden", "You may not see this group.")
        return {**document, "description": "", "subscription_id": None, "subscription_info": None}

    def _document(self, group: Group, subject: str) -> Json:
        account = self._directory.account(subject)
        return {
            "name": group.name,
            "parent_id": None,
            "id": group.id,
            "group_type": "regular",
            "enforce_session": False,
            "session_limit": 28800,
            "session_timeouts": {},
            "my_memberships": [
                {
                    "group_id": group.id,
                    "identity_id": one,
                    "username": self._directory.account(one).username,
                    "role": group.members[one][0],
                    "status": group.members[one][1],
                }
                for one in (account.id, *account.linked)
                if one in group.members
            ],
            "policies": {
                "group_visibility": group.visibility,
                "group_members_visibility": "managers",
            },
        }
