"""`make pin-images`: writes behind the tag of each image in `deploy/` the digest that it has now.

`redis:8.2.2-bookworm` becomes `redis:8.2.2-bookworm@sha256:…`: what was tried is deployed, wherever the tag moves. Run
it again to move to a newer image of the same tag. Needs Python and access to the registries; registries on loopback addresses are
reached without TLS, as Docker does.

    pin_images.py [--check] [FILE...]

Exit code 0: done; with --check: all images are pinned. 1: with --check: some are not, they are printed. 2: a digest is missing.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
TIMEOUT_S: Final = 20
# A registry has a dot or a port in its name; images without one are ours, built and not pulled.
IMAGE: Final = re.compile(
    r"(?<![\w./-])(?P<registry>[a-z0-9-]+(?:\.[a-z0-9-]+)+(?::\d+)?)/(?P<name>[a-z0-9._/-]+):(?P<tag>[A-Za-z0-9._-]+)"
    r"(?P<digest>@sha256:[0-9a-f]{64})?"
)
_REFERENCE_LINE: Final = re.compile(r"^\s*(?:-\s+)?(?:image:|imageName:|ARG PYTHON=|FROM )")
_MANIFESTS: Final = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_HOSTS: Final = {"docker.io": "registry-1.docker.io"}


class Unresolved(Exception):
    """A tag whose digest cannot be had; the message says why."""


def files() -> list[Path]:
    """The files that name images.

    Returns:
        Their paths.
    """
    deploy = ROOT / "deploy"
    return [
        deploy / "docker" / "Dockerfile",
        deploy / "docker" / "compose.yaml",
        *sorted((deploy / "kubernetes").rglob("*.yaml")),
    ]


def images(text: str) -> Iterable[re.Match[str]]:
    """The images that a file names.

    Args:
        text: of a Dockerfile, a Compose file or a manifest.

    Returns:
        Matches of `IMAGE`.
    """
    return [found for line in text.splitlines() if _REFERENCE_LINE.match(line) for found in IMAGE.finditer(line)]


def digest_of(registry: str, name: str, tag: str) -> str:
    """Ask a registry for the digest of a tag: of the index of all platforms, where the image has one.

    Args:
        registry: host, with a port where it has one.
        name: of the repository.

    Returns:
        `sha256:` and 64 hex digits.

    Raises:
        Unresolved: if the registry cannot be reached or does not know the image.
    """
    host = _HOSTS.get(registry, registry)
    scheme = "http" if re.match(r"127\.|localhost(:|$)", host) else "https"
    url = f"{scheme}://{host}/v2/{name}/manifests/{tag}"
    headers = {"Accept": _MANIFESTS}
    try:
        try:
            answer = _head(url, headers)
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
            answer = _head(url, {**headers, "Authorization": f"Bearer {_token(error.headers.get('WWW-Authenticate', ''))}"})
    except (OSError, ValueError) as error:
        raise Unresolved(f"{registry}/{name}:{tag}: {getattr(error, 'reason', None) or error}") from None
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", answer):
        raise Unresolved(f"{registry}/{name}:{tag}: the registry answered without a digest")
    return answer


def pin(path: Path) -> int:
    """Pin all images of a file.

    Args:
        path: the file; written only if all digests were found.

    Returns:
        How many images it names.

    Raises:
        Unresolved: naming the first image without a digest.
    """
    text = path.read_text(encoding="utf-8")
    wanted = {(each["registry"], each["name"], each["tag"]) for each in images(text)}
    digests = {each: digest_of(*each) for each in sorted(wanted)}
    lines = [
        IMAGE.sub(lambda each: f"{each['registry']}/{each['name']}:{each['tag']}@{digests[each[1], each[2], each[3]]}", line)
        if _REFERENCE_LINE.match(line)
        else line
        for line in text.splitlines(keepends=True)
    ]
    path.write_text("".join(lines), encoding="utf-8")
    return len(wanted)


def main(arguments: list[str]) -> int:
    """Pin or check.

    Args:
        arguments: of the command line.

    Returns:
        The exit code.
    """
    check = "--check" in arguments
    paths = [Path(each) for each in arguments if each != "--check"] or files()
    if check:
        loose = [
            f"{path}: {each[0]}" for path in paths for each in images(path.read_text(encoding="utf-8")) if not each["digest"]
        ]
        print("\n".join(loose) or "pin-images: every image has a digest")
        return 1 if loose else 0
    try:
        for path in paths:
            print(f"pin-images: {path}: {pin(path)} images")
    except Unresolved as error:
        print(f"pin-images: no digest: {error}: run this where the registry can be reached", file=sys.stderr)
        return 2
    return 0


def _head(url: str, headers: dict[str, str]) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method="HEAD"), timeout=TIMEOUT_S) as answer:
        return str(answer.headers.get("Docker-Content-Digest", ""))


def _token(challenge: str) -> str:
    """A token for reading, from whom the registry names (distribution's token authentication)."""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = fields.pop("realm", "")
    if not realm.startswith(("https://", "http://127.")):
        raise ValueError("the registry wants an authentication that is not supported")
    with urllib.request.urlopen(f"{realm}?{urllib.parse.urlencode(fields)}", timeout=TIMEOUT_S) as answer:
        given = json.load(answer)
    return str(given.get("token") or given.get("access_token"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
