"""Images are pinned to what a registry has: a real one, Debian's docker-registry."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from scripts.pin_images import ROOT, files, images, main
from tests.moments import PATIENCE_S, wait_until
from tests.servers.ports import free_port

MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed: it comes with the Debian package docker-registry")
    directory = tmp_path_factory.mktemp("registry")
    port = free_port()
    config = directory / "config.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {directory / 'data'}}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/v2/"), what="the registry")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def push(registry: str, name: str, tag: str, label: str) -> str:
    """Push an image without layers.

    Returns:
        Its digest.
    """
    base = f"http://{registry}/v2/{name}"
    config = json.dumps({"architecture": "amd64", "os": "linux", "label": label}).encode()
    digest = f"sha256:{hashlib.sha256(config).hexdigest()}"
    place = httpx.post(f"{base}/blobs/uploads/").headers["Location"]
    done = httpx.put(place + f"&digest={digest}", content=config, headers={"Content-Type": "application/octet-stream"})
    assert done.status_code == 201
    kind = "application/vnd.oci.image.config.v1+json"
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": kind, "digest": digest, "size": len(config)},
            "layers": [],
        }
    ).encode()
    assert httpx.put(f"{base}/manifests/{tag}", content=manifest, headers={"Content-Type": MANIFEST}).status_code == 201
    return f"sha256:{hashlib.sha256(manifest).hexdigest()}"


def test_tags_get_the_digests_that_they_have_now(registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, python = push(registry, "library/redis", "8.2", "a"), push(registry, "python", "3.13-slim", "b")
    compose, dockerfile = tmp_path / "compose.yaml", tmp_path / "Dockerfile"
    compose.write_text(
        f"a:\n  image: {registry}/library/redis:8.2\nb:\n  image: tidegate:0.1.0\n  url: http://{registry}/library/redis:8.2\n"
        f"c: {{x: 1}}\n- image: {registry}/library/redis:8.2\n"
    )
    dockerfile.write_text(f"ARG PYTHON={registry}/python:3.13-slim\nFROM ${{PYTHON}} AS build\n")
    both = [str(compose), str(dockerfile)]
    assert main(["--check", *both]) == 1
    assert f"{compose}: {registry}/library/redis:8.2" in capsys.readouterr().out
    assert main(both) == 0
    assert compose.read_text().count(f"image: {registry}/library/redis:8.2@{first}\n") == 2
    assert f"  image: tidegate:0.1.0\n  url: http://{registry}/library/redis:8.2\n" in compose.read_text()
    assert dockerfile.read_text() == f"ARG PYTHON={registry}/python:3.13-slim@{python}\nFROM ${{PYTHON}} AS build\n"
    assert main(["--check", *both]) == 0
    # The tag moves, and so does the pin when it is asked for.
    second = push(registry, "library/redis", "8.2", "c")
    assert main(both) == 0
    assert compose.read_text().count(second) == 2
    assert first not in compose.read_text()


def test_a_file_is_whole_or_untouched(registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(registry, "there", "1", "a")
    file = tmp_path / "compose.yaml"
    text = f"image: {registry}/there:1\nimage: {registry}/missing:1\n"
    file.write_text(text)
    assert main([str(file)]) == 2
    assert f"{registry}/missing:1" in capsys.readouterr().err
    assert file.read_text() == text


def test_every_image_of_deploy_is_known() -> None:
    named = {f"{each['registry']}/{each['name']}" for file in files() for each in images(file.read_text())}
    text = "".join(file.read_text() for file in (ROOT / "deploy").rglob("*.yaml"))
    assert {"docker.io/library/python", "docker.io/library/redis", "docker.io/library/postgres"} <= named
    for registry in ("docker.io", "quay.io", "ghcr.io"):
        # No image is named in a form that is not pinned.
        lines = [line for line in text.splitlines() if f"{registry}/" in line and not line.lstrip().startswith("#")]
        assert all(images(line) for line in lines), lines
