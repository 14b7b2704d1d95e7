"""/admin/v1/blocks: who is stopped, whatever the limits."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

from tidegate.admin.block_models import BlockCreate, BlockKind, BlockPage, BlockRead, BlockStatus
from tidegate.admin.blocks import create_block, get_block, list_blocks, remove_block
from tidegate.admin.rules import CatalogEditor
from tidegate.doors.admin.common import Actor, AdminRouter, After, Exactly, Ip, Limit

BlockId = Annotated[int, Path(ge=1, le=2**53)]
Status = Annotated[BlockStatus, Query(description="active, ended (expired or removed), or all")]
Kind = Annotated[BlockKind | None, Query(description="filter: what is blocked")]


def block_routes(editor: CatalogEditor) -> AdminRouter:
    """The routes of blocks."""
    routes = AdminRouter(prefix="/blocks", tags=["blocks"])

    @routes.get("", summary="List blocks, the newest first; ip: those of networks that contain an address")
    async def read_all(
        limit: Limit = 100,
        after: After = None,
        status: Status = "active",
        kind: Kind = None,
        target: Exactly = None,
        ip: Ip = None,
    ) -> BlockPage:
        page = await list_blocks(editor, limit, after, status, kind, target, ip)
        return BlockPage(items=page.items, next=page.next)

    @routes.post("", status_code=201, summary="Block a network, an API key, a customer or values of attributes")
    async def create(given: BlockCreate, actor: Actor) -> BlockRead:
        return await create_block(editor, actor, given)

    @routes.get("/{block_id}", summary="Read a block")
    async def read(block_id: BlockId) -> BlockRead:
        return await get_block(editor, block_id)

    @routes.delete("/{block_id}", summary="Lift a block; its record stays for 30 days")
    async def remove(block_id: BlockId, actor: Actor) -> BlockRead:
        return await remove_block(editor, actor, block_id)

    return routes
