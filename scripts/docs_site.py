"""Hooks of mkdocs: pages made from the code, and links that leave the documentation.

The HTTP interfaces are described by the servers themselves (OpenAPI), the Python one by its docstrings; both are made into pages
when the site is built, so that no page says what the code does not. Files outside `docs/` become links to the repository.
"""

from __future__ import annotations

import asyncio
import gc
import posixpath
import re
from collections.abc import Iterator
from typing import Any, Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import tidegate
from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.admin.app import AdminDeps, admin_app
from tidegate.doors.openapi import data_plane_openapi
from tidegate.gate.gate import Gate

# Building takes seconds and 170 MiB. To look for garbage meanwhile takes a fifth of the CPU time, and finds next to nothing.
gc.disable()

_LINK: Final = re.compile(r"(?<!!)\[([^\[\]]*)\]\(((?:\.\./)+[^)#]*)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files outside `docs/` lead to the repository; where its address is not set, they become plain text."""
    del files
    base = (config.repo_url or "").rstrip("/")

    def outside(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), found[2]))
        if target.startswith("docs/"):
            return found[0]
        if not base:
            return found[1] if found[1].strip("`") in target else f"{found[1]} (`{target}`)"
        return f"[{found[1]}]({base}/blob/main/{target}{'/' if found[2].endswith('/') else ''}{found[3] or ''})"

    return _LINK.sub(outside, markdown)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code.

    Args:
        files: of the site.
        config: of the site.

    Returns:
        The same, and more.
    """
    made = {
        "reference/python.md": _python(),
        "reference/data-plane.md": _openapi("The data plane", data_plane_openapi()),
        "reference/control-plane.md": _openapi("The control plane", asyncio.run(_control_plane())),
    }
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def _python() -> str:
    names = [name for name in tidegate.__all__ if not name.startswith("_")]
    parts = ["# Python\n", "What `import tidegate` gives, from its docstrings. [Python](../python.md) shows how it is used.\n"]
    parts += [f"::: tidegate.{name}\n" for name in names]
    parts += ["## tidegate.client\n", "::: tidegate.client.Client\n", "::: tidegate.client.AsyncClient\n"]
    return "\n".join(parts)


async def _control_plane() -> dict[str, Any]:
    catalog = await SqlCatalog.open("sqlite://")
    try:
        gate = Gate(CachedCatalog(catalog), MemoryCounters())
        return admin_app(AdminDeps(CatalogEditor(catalog, lambda *_: None), gate)).openapi()
    finally:
        await catalog.close()


def _openapi(title: str, described: dict[str, Any]) -> str:
    lines = [f"# {title}\n", f"From its own `/openapi.json`, version {described['info']['version']}.\n"]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            lines += [f"## {method.upper()} {path}\n", *_operation(operation)]
    return "\n".join(lines)


def _operation(operation: dict[str, Any]) -> Iterator[str]:
    for text in (operation.get("summary"), operation.get("description")):
        if text:
            yield f"{text}\n"
    parameters = operation.get("parameters", ())
    if parameters:
        yield "| parameter | in | needed | what |\n|---|---|---|---|"
        for each in parameters:
            needed = "yes" if each.get("required") else ""
            yield f"| `{each['name']}` | {each['in']} | {needed} | {_cell(each.get('description'))} |"
        yield ""
    body = operation.get("requestBody", {}).get("content", {})
    for kind, form in body.items():
        yield f"Body: `{kind}`, {_schema(form.get('schema', {}))}\n"
    yield "| status | what |\n|---|---|"
    for status, answer in operation["responses"].items():
        schemas = "; ".join(_schema(each.get("schema", {})) for each in answer.get("content", {}).values())
        yield f"| {status} | {_cell(answer.get('description'))} {schemas} |"
    yield ""


def _schema(schema: dict[str, Any]) -> str:
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    return f"`{name}`" if name else str(schema.get("type", ""))


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
