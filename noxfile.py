"""Environments of their own, for hosts that are optional: ``make test-all``, or one of them: ``nox -s deepspeed``.

A further host is one entry in ``HOSTS``.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.stop_on_first_error = False

PYTEST = ("pytest", "pytest-xdist")


@dataclass(frozen=True)
class Host:
    """What an environment holds, and what runs in it.

    Attributes:
        packages: beside torch, adafreeze and pytest.
        tests: for pytest.
        without: what a package brings, and no test needs.
        without_dependencies: of tools that also require GPU packages or other versions, with what they import.
        constraints: versions of all else.
        environment: variables while the tests run.
    """

    packages: tuple[str, ...]
    tests: tuple[str, ...]
    without: tuple[str, ...] = ()
    without_dependencies: tuple[str, ...] = ()
    constraints: str = "constraints.txt"
    environment: dict[str, str] = field(default_factory=dict)


HOSTS = {
    "adapters": Host(  # with the older transformers that it pins
        packages=("adapters==1.3.0", "lmdb"),
        tests=(
            *("-n", "2", "tests/adapterhub"),
            "tests/tasks/test_squad.py",  # the official metric went with transformers 5
        ),
        constraints="constraints-adapters.txt",
    ),
    "axolotl": Host(
        packages=("bitsandbytes", "colorama", "pillow", "platformdirs", "pydantic", "requests", "six"),
        without_dependencies=(
            *("axolotl==0.19.0", "axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6", "trl==1.9.0"),
            *("addict==2.4.0", "art==6.5", "backoff==2.2.1", "distro==1.9.0", "einops==0.8.2", "evaluate==0.4.6"),
            *("fastcore==2.2.41", "fire==0.7.1", "httpcore==1.0.9", "httpx==0.28.1", "kernels==0.16.0"),
            *("kernels-data==0.16.2", "llvmlite==0.50.0", "numba==0.68.1", "opentelemetry-api==1.45.2"),
            *("posthog==6.7.11", "protobuf==7.36.2", "python-dotenv==1.2.4", "schedulefree==1.4.1"),
            *("termcolor==3.3.0", "triton==3.9.0", "wandb==0.31.0"),
        ),
        tests=("tests/hosts/test_axolotl.py",),
    ),
    "curvlinops": Host(  # an oracle; the torchvision that it brings is CUDA's, and fails beside a torch for CPUs
        packages=("curvlinops-for-pytorch",),
        tests=("tests/analysis/test_curvlinops.py",),
        without=("torchvision",),
    ),
    "deepspeed": Host(
        packages=("deepspeed==0.19.8",),
        tests=("tests/distributed/test_deepspeed.py", "tests/distributed/test_zero_trainer.py"),
        environment={"DS_ACCELERATOR": "cpu"},
    ),
    "llama-factory": Host(  # with its own older versions, and without its web page, sound, images and model hubs
        packages=(
            *("datasets", "einops", "fastapi", "fire", "matplotlib", "omegaconf", "protobuf", "pydantic"),
            *("sentencepiece", "sse-starlette", "tiktoken", "uvicorn"),
        ),
        without_dependencies=("llamafactory==0.9.5", "trl==0.24.0"),
        tests=("tests/hosts/test_llama_factory.py",),
        constraints="constraints-llama-factory.txt",
        environment={"PYTHONPATH": str(Path("tests/hosts/stubs").resolve())},
    ),
    "lightning": Host(
        packages=("lightning==2.6.6",),
        tests=("tests/integrations/test_lightning.py", "tests/test_examples.py", "-k", "lightning"),
    ),
    "sentence-transformers": Host(
        packages=("sentence-transformers==6.2.0", "setfit==1.2.0"),
        tests=(
            *("tests/hosts/test_sentence_transformers.py", "tests/hosts/test_setfit.py", "tests/test_examples.py"),
            *("-k", "sentence_transformers or setfit"),
        ),
    ),
    "ms-swift": Host(
        packages=("attrs", "matplotlib", "pillow", "requests", "six", "sortedcontainers", "trl"),
        without_dependencies=(
            *("ms-swift==4.6.0", "modelscope==1.40.2", "modelscope-hub==0.5.1", "addict==2.4.0", "aiohttp==3.14.5"),
            *("aiohappyeyeballs==2.7.1", "aiosignal==1.4.0", "attrdict==2.0.1", "binpacking==2.0.1", "cffi==2.1.1"),
            *("cryptography==50.0.2", "dacite==1.9.2", "einops==0.8.2", "fastapi==0.165.0", "frozenlist==1.8.0"),
            *("json-repair==0.64.6", "multidict==7.2.1", "openai==3.57.0", "propcache==0.5.4"),
            *("simplejson==4.3.0", "starlette==1.10.0", "yarl==1.25.1"),
        ),
        tests=("tests/hosts/test_ms_swift.py",),
    ),
}
ALWAYS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def run(session: nox.Session) -> None:
    """Install the host named as the session, and run its tests; arguments after ``--`` go to pytest."""
    host = HOSTS[session.name]
    # torch first and alone: left to a dependency, pip may take a CUDA build of several gigabytes.
    session.install("-c", host.constraints, "torch==2.13.0")
    session.install("-c", host.constraints, "-e", ".", *PYTEST, *host.packages)
    if host.without_dependencies:
        session.install("--no-deps", *host.without_dependencies)
    if host.without:
        session.run("python", "-m", "pip", "uninstall", "-q", "-y", *host.without)
    session.run("pytest", "-q", "--durations=5", *host.tests, *session.posargs, env=ALWAYS | host.environment)


# What another version of transformers, PEFT or accelerate breaks first, in about three minutes.
SLICE = (
    *("tests/integrations/test_transformers.py", "tests/integrations/test_export.py", "tests/loop/test_safe.py"),
    *("tests/cache/test_cache.py", "tests/memory/test_lean.py", "tests/resume/test_checkpoints.py"),
    *("tests/resume/test_restored.py", "tests/test_readme.py"),
)


@nox.session
def lowest(session: nox.Session) -> None:
    """The lowest versions that pyproject.toml allows, of all but torch; what they bring is the newest that fits."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["disk"]]
    session.install("torch==2.13.0")
    session.install(*(one.replace(">=", "==") for one in direct if not one.startswith("torch")), *PYTEST, "hypothesis")
    session.install("--no-deps", "-e", ".")
    session.run("pytest", "-q", "-n", "2", "--durations=5", *SLICE, *session.posargs, env=ALWAYS)


@nox.session
def newest(session: nox.Session) -> None:
    """The newest versions of everything but torch, without constraints.txt: shows early what a release breaks."""
    session.install("torch==2.13.0")
    session.install("-U", "--upgrade-strategy", "eager", "torch==2.13.0", "-e", ".[disk]", *PYTEST, "hypothesis")
    session.run("pytest", "-q", "-n", "2", "--durations=5", *SLICE, *session.posargs, env=ALWAYS)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into site/; a dead link or a name that is not there fails. adafreeze is read, not imported."""
    session.install(
        "-c", "constraints.txt", *nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["docs"]
    )
    session.run("mkdocs", "build", "--strict", "--quiet")


@nox.session(default=False)  # it writes into docs/
def tour(session: nox.Session) -> None:
    """Run docs/tour.py and write docs/tour.md and its pictures: the page is the output of the script."""
    session.install("-c", "constraints.txt", "torch==2.13.0")
    session.install(
        "-c", "constraints.txt", "-e", ".[disk]", "matplotlib", "scikit-learn", "jupytext", "nbconvert", "ipykernel"
    )
    session.install("--no-deps", "--require-hashes", "-r", "requirements-demo.txt")
    folder = Path(session.create_tmp()).resolve()
    script, page = Path("docs/tour.py").resolve(), Path("docs/tour.md").resolve()
    pictures = page.with_name("tour_files")
    with session.chdir(folder):
        shutil.rmtree("tour", ignore_errors=True)  # of an earlier run
        session.run("jupytext", "--to", "ipynb", "--execute", str(script), "-o", "tour.ipynb", env=ALWAYS)
        session.run(
            "jupyter", "nbconvert", "--to", "markdown", "--CoalesceStreamsPreprocessor.enabled=True", "tour.ipynb"
        )
        shutil.rmtree(pictures, ignore_errors=True)
        shutil.copytree("tour_files", pictures)
    text = (folder / "tour.md").read_text().replace(f"{folder}/", "")
    page.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


for name in HOSTS:
    nox.session(name=name)(run)
