"""PEFT's own LoRA tests over our layer: what passes there must pass here.

    python tests/peft_suite.py FOLDER [--plain] [options of pytest]

FOLDER holds PEFT's `tests`, as its source distribution has them (`pip download peft --no-binary
peft --no-deps`, of the version that is installed). A LoRA layer over `nn.Linear` is a
`MaskedLoraLinear` there, and nothing else changes; `--plain` leaves PEFT's own, to compare with.
Of the tests with a configuration as a parameter, those of `LoraConfig` run. Tests that load a
model from the hub need a filled cache: without one they fail either way.
"""

import argparse
import sys
from pathlib import Path

import pytest

# Tests without a configuration among their parameters, all about LoRA.
FILES = (
    "test_custom_models.py",
    "test_lora_variants.py",
    "test_initialization.py",
    "test_arrow.py",
    "test_bdlora.py",
    "test_helpers.py",
    "test_lora_conversion.py",
    "test_lora_ga.py",
    "test_lora_intruders.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_low_level_api.py",
    "test_riemannian_lora.py",
    "test_target_parameters.py",
    "test_tuners_utils.py",
    "test_velora.py",
)
# They compare with the name of PEFT's class, which ours does not have.
OF_THE_NAME = (
    "test_repr_lora",
    "test_modules_to_save_targets_lora_layer_raises",
    "test_module_type_",
    "test_target_parameters_and_target_modules",
)


class OurLayer:
    """A pytest plugin: PEFT makes our layers, and tests of other methods are left out."""

    def __init__(self, plain: bool):
        self.plain = plain

    def pytest_configure(self) -> None:
        from peft.tuners.lora import layer

        from ila import MaskedLoraLinear

        if not self.plain:
            layer.Linear = MaskedLoraLinear

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        kept = [item for item in items if _is_lora(item) and not _is_of_the_name(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def _is_of_the_name(item: pytest.Item) -> bool:
    return item.name.startswith(OF_THE_NAME)


def _is_lora(item: pytest.Item) -> bool:
    from peft import LoraConfig, PeftConfig

    parameters = getattr(item, "callspec", None)
    values = [] if parameters is None else parameters.params.values()
    kinds = [v for v in values if isinstance(v, type) and issubclass(v, PeftConfig)]
    return all(kind is LoraConfig for kind in kinds)


def run(folder: Path, *options: str, plain: bool = False) -> int:
    """Run the tests in PEFT's `tests` folder; return pytest's exit status."""
    files = [str(folder / name) for name in FILES if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{folder} holds none of PEFT's tests: {', '.join(FILES)}")
    given = options if any(".py" in option for option in options) else (*files, *options)
    own = ["-o", "addopts=", "--import-mode=importlib", f"--rootdir={folder.parent}", "-q"]
    return pytest.main([*own, *given], plugins=[OurLayer(plain)])


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="PEFT's tests")
    parser.add_argument("--plain", action="store_true", help="over PEFT's own layer, to compare")
    found, options = parser.parse_known_args()
    return run(found.folder.resolve(), *options, plain=found.plain)


if __name__ == "__main__":
    sys.exit(main())
