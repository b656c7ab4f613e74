"""The house rules that a program can read: the order of the storeys, and what an import may do.

The tests marked `static` read sources only, so `make check` runs them without torch.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Bottom first. A file imports from its own storey or from those before it. A storey is a module or
# a subpackage; `__init__` is the package's own and stands where its public names are complete.
STOREYS = {
    "ila_kernels": (
        "_version",
        "choice",
        "config",
        "device",
        "quant",
        "validate",
        "dropout",
        "reference",
        "swiglu",
        "eager",
        "group",
        "kernels",
        "traced",
        "ops",
        "roofline",
        "time_budget",
        "functional",
        "testing",
        "__init__",
    ),
    "ila": (
        "files",
        "claims",
        "mask",
        "budget",
        "shapes",
        "costs",
        "speed",
        "spending",
        "selection",
        "messages",
        "layer",
        "quantized",
        "checkpointing",
        "swapped",
        "shared_input",
        "attention",
        "mlp",
        "model",
        "explanation",
        "rows",
        "rendering",
        "data",
        "ranks",
        "checkpoint",
        "memory",
        "measure",
        "calibration",
        "states",
        "cached_rows",
        "halves",
        "prefix",
        "trainer",
        "full",
        "signals",
        "baselines",
        "stability",
        "stages",
        "updates",
        "gated_weights",
        "search_config",
        "work",
        "scoring",
        "search",
        "train",
        "loading",
        "pipeline",
        "runs",
        "report",
        "figures",
        "pareto",
        "budgeted",
        "__init__",
        "commands",
        "demo",
        "cli",
        "__main__",
    ),
}

# Tensors and no models: what ila_kernels leaves to the package above it.
MODEL_LIBRARIES = {
    "accelerate",
    "datasets",
    "huggingface_hub",
    "ila",
    "peft",
    "tokenizers",
    "transformers",
    "trl",
}
# Below the public functions of ila_kernels; `ila` does not reach past those.
INNER_STOREYS = {"validate", "dropout", "swiglu", "eager", "group", "kernels", "ops"}
# Importable in a millisecond, wherever a mask or a row is read.
PURE_STOREYS = {"files", "claims", "mask", "budget", "selection", "messages"}

# "path": {"VARIABLE", ...}. Empty: no environment variable chooses numerics or back ends here.
ENVIRONMENT_READS: dict[str, set[str]] = {}


def sources(folder: str) -> list[Path]:
    return sorted((REPOSITORY / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def storey_of(path: str) -> tuple[str, str]:
    """Return package and storey of `package/storey.py` or `package/storey/....py`."""
    package, storey = path.split("/")[:2]
    return package, storey.removesuffix(".py")


def imported(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) for every import, lazy and type-checking ones included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.split("/")[: -node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from ila import mask` means the module, `from ila import LayerMask` the package.
                is_storey = alias.name in STOREYS.get(module, ())
                yield node.lineno, f"{module}.{alias.name}" if is_storey else module


def target_of(module: str) -> tuple[str, str]:
    package, _, rest = module.partition(".")
    return package, rest.split(".")[0] or "__init__"


def arrows_that_point_up(path: str, source: str) -> list[str]:
    """Return one message for each import of `source` that the order of the storeys forbids."""
    package, storey = storey_of(path)
    order = STOREYS[package]
    wrong = []
    for line, module in imported(path, source):
        to_package, to_storey = target_of(module)
        if to_package == package and to_storey not in order:
            why = f"{to_storey!r} is in no storey; list it in STOREYS"
        elif to_package == package and order.index(to_storey) > order.index(storey):
            why = f"{to_storey} stands above {storey}"
        elif package == "ila_kernels" and to_package in MODEL_LIBRARIES:
            why = "ila_kernels knows tensors and no models"
        elif package == "ila" and to_package == "ila_kernels" and to_storey in INNER_STOREYS:
            why = "ila calls the public functions of ila_kernels"
        elif (
            package == "ila" and storey in PURE_STOREYS and to_package in {"torch", "transformers"}
        ):
            why = f"{storey} is pure"
        elif to_package in {"tests", "benchmarks", "examples", "setup"}:
            why = "nothing imports tests, benchmarks or examples"
        else:
            continue
        wrong.append(f"{path}:{line}: imports {module}: {why}")
    return list(dict.fromkeys(wrong))


@pytest.mark.static
@pytest.mark.parametrize("package", STOREYS)
def test_every_file_has_a_storey(package):
    unlisted = [
        name_of(p) for p in sources(package) if storey_of(name_of(p))[1] not in STOREYS[package]
    ]
    assert not unlisted, (
        f"no storey for {unlisted}: add each to STOREYS[{package!r}] in tests/test_house.py, "
        "below everything that imports it and above everything it imports"
    )


@pytest.mark.static
@pytest.mark.parametrize("package", STOREYS)
def test_arrows_point_down(package):
    known = [p for p in sources(package) if storey_of(name_of(p))[1] in STOREYS[package]]
    wrong = [w for p in known for w in arrows_that_point_up(name_of(p), p.read_text("utf-8"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.static
@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ila_kernels/config.py", "from ila_kernels.ops import op"),
        ("ila_kernels/config.py", "from ila_kernels import ops"),
        ("ila_kernels/config.py", "from . import ops"),
        ("ila_kernels/config.py", "import ila_kernels.ops as o"),
        ("ila_kernels/kernels/shrink.py", "from ..ops import op"),
        # The package itself: half made while its own modules are imported.
        ("ila_kernels/ops.py", "from ila_kernels import __version__"),
        ("ila_kernels/ops.py", "def lazy():\n    import transformers"),
        ("ila_kernels/ops.py", "from ila.mask import LayerMask"),
        ("ila_kernels/ops.py", "from ila_kernels.helpers import f"),
        ("ila/mask.py", "import torch.nn"),
        ("ila/search.py", "from ila_kernels import ops"),
        ("ila/search.py", "import benchmarks.run"),
        ("ila/demo.py", "from ila.cli import main"),
    ],
)
def test_an_arrow_up_is_reported(path, source):
    assert len(arrows_that_point_up(path, source)) == 1


@pytest.mark.static
@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "ila_kernels/ops.py",
            "from . import config, eager\nfrom .kernels import shrink\nimport torch",
        ),
        ("ila_kernels/kernels/shrink.py", "from ila_kernels.kernels.pieces import f"),
        ("ila_kernels/__init__.py", "from .functional import masked_lora_linear"),
        ("ila/search.py", "import ila_kernels\nfrom ila_kernels import masked_lora_linear"),
        ("ila/cli.py", "import ila\nfrom ila import LayerMask, demo"),
        ("ila/__main__.py", "from ila.cli import main"),
    ],
)
def test_an_arrow_down_is_not_reported(path, source):
    assert arrows_that_point_up(path, source) == []


@pytest.mark.static
@pytest.mark.parametrize(
    ("folder", "never"),
    [("benchmarks", {"tests"}), ("examples", {"tests", "benchmarks"})],
)
def test_nothing_imports_the_tests(folder, never):
    wrong = [
        f"{name_of(path)}:{line}: imports {module}"
        for path in sources(folder)
        for line, module in imported(name_of(path), path.read_text("utf-8"))
        if target_of(module)[0] in never
    ]
    assert not wrong, "\n".join(wrong)


def environment_reads(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, expression) wherever `os.environ`, `os.environb` or `os.getenv` is named."""
    names = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in names
            and ast.unparse(node.value) == "os"
        ):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from ((node.lineno, f"os.{a.name}") for a in node.names if a.name in names)


@pytest.mark.static
@pytest.mark.parametrize("package", STOREYS)
def test_no_environment_variable_is_read(package):
    wrong = [
        f"{name_of(path)}:{line}: {what}"
        for path in sources(package)
        if name_of(path) not in ENVIRONMENT_READS
        for line, what in environment_reads(path.read_text("utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.static
def test_an_environment_read_is_reported():
    assert len(list(environment_reads("import os\nos.environ['A']\nos.getenv('B')"))) == 2
    assert len(list(environment_reads("from os import environ, path"))) == 1


def in_fresh_process(code: str) -> str:
    """Run `code` in a new interpreter at the root of the repository; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", STOREYS)
def test_import_works_with_triton_absent_and_touches_no_gpu(package):
    printed = in_fresh_process(
        "import sys\n"
        "sys.modules['triton'] = None\n"  # an import of triton now raises ImportError
        f"import {package}, torch\n"
        "print(torch.cuda.is_initialized())"
    )
    # Equality: an import that says anything else has done something.
    assert printed == "False"


def test_kernels_import_no_model_library():
    printed = in_fresh_process(
        f"import sys, ila_kernels\nprint(sorted({MODEL_LIBRARIES!r} & set(sys.modules)))"
    )
    assert printed == "[]"


def test_version_is_written_once():
    built = in_fresh_process(
        "import sys, runpy\nsys.argv = ['setup.py', '--version']\nrunpy.run_path('setup.py')"
    )
    imported = in_fresh_process("import ila_kernels\nprint(ila_kernels.__version__)")
    assert built.split()[-1] == imported
