"""/admin/v1/notifications: what `[[notify]]` sends."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

from tidegate.admin.models import Plain
from tidegate.admin.notification_models import NotificationPage, NotificationRead, NotificationStatus
from tidegate.admin.notifications import list_notifications, retry_notification
from tidegate.admin.rules import CatalogEditor
from tidegate.doors.admin.common import Actor, AdminRouter, After, Limit

NotificationId = Annotated[str, Path(max_length=40), Plain]
Status = Annotated[NotificationStatus | None, Query(description="filter: pending, delivered or failed")]


def notification_routes(editor: CatalogEditor) -> AdminRouter:
    """The routes of notifications."""
    routes = AdminRouter(prefix="/notifications", tags=["notifications"])

    @routes.get("", summary="List notifications, the newest first")
    async def read_all(limit: Limit = 100, after: After = None, status: Status = None) -> NotificationPage:
        page = await list_notifications(editor, limit, after, status)
        return NotificationPage(items=page.items, next=page.next)

    @routes.post("/{notification_id}/retry", summary="Deliver a pending or failed notification now")
    async def retry(notification_id: NotificationId, actor: Actor) -> NotificationRead:
        return await retry_notification(editor, actor, notification_id)

    return routes
