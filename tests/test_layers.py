"""The layers of the house: a module imports only from lower ones, and nothing executes what it reads."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    {
        "mim.allocator",
        "mim.attention",
        "mim.batch_norm",
        "mim.blocks",
        "mim.code_loss",
        "mim.config",
        "mim.contracts",
        "mim.initialization",
        "mim.interruption",
        "mim.interventions",
        "mim.masking",
        "mim.patch_statistics",
        "mim.patches",
        "mim.plan_text",
        "mim.schedules",
        "mim.survey",
        "tokenizer",
    },
    {"mim.backbone", "mim.health", "mim.last_block", "mim.log", "mim.optim", "mim.segmentation_heads"},
    {"mim.data", "mim.encoders"},
    {"mim.objectives", "mim.ranks", "mim.tracker_kinds"},
    {"mim.guard", "mim.saving", "mim.sharding", "mim.trackers", "mim.watch"},
    {"mim.frozen_networks", "mim.movement", "mim.pretrained", "mim.report"},
    {"mim.classifying_teacher"},
    {"mim.build"},
    {"mim.experiment", "mim.handover", "mim.job", "mim.probing"},
    {
        "mim.clusters",
        "mim.exports",
        "mim.launching",
        "mim.loader_speed",
        "mim.looking",
        "mim.make_tokens",
        "mim.pictures",
        "mim.planning",
        "mim.rollback",
    },
    {"mim.backbone_file", "mim.evals"},
    {"mim.demo", "mim.train"},
    {"mim.dry_run", "mim.rehearsal"},
    {"mim.plan"},
    {"mim.commands"},
    {"mim.__main__"},
]
APART = {"mim.encoders", "mim.objectives", "mim.evals", "mim.exports"}  # no file there knows the one beside it
FORBIDDEN_NAMES = {"utils", "common", "helper", "helpers", "manager", "base", "core", "misc"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"torch.load", "os.system", "os.popen", "eval", "exec"}
READS_PICKLES = "mim.pretrained.weight_files"  # alone, and only with weights_only=True


def name_of(file: Path) -> str:
    """The dotted name of a source file; a package's `__init__.py` has the package's name."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(file): file for part in ("mim", "tokenizer") for file in sorted((ROOT / part).rglob("*.py"))}
TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}
MODULES = sorted(FILES)


def part_of(module: str) -> str:
    """The entry of LEVELS that a module belongs to."""
    found = [part for level in LEVELS for part in level if module == part or module.startswith(f"{part}.")]
    assert found, f"{module} stands in no layer; give it one in LEVELS"
    return max(found, key=len)


def level_of(part: str) -> int:
    return next(number for number, level in enumerate(LEVELS) if part in level)


def imports(module: str) -> set[str]:
    """Dotted names that a module imports, at its top or inside a function."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (above, node.module)))
            found |= {name if (name := f"{source}.{alias.name}") in FILES else source for alias in node.names}
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "mim"])
def test_a_module_imports_only_from_lower_layers(module):
    own = part_of(module)
    for imported in imports(module) & FILES.keys() - {"mim"}:  # `mim` itself holds the version alone
        other = part_of(imported)
        allowed = own not in APART if other == own else level_of(other) < level_of(own)
        assert allowed, f"{module} imports {imported}"


def test_the_package_itself_imports_nothing():
    assert imports("mim") == set()


def test_the_tokenizers_know_nothing_of_the_pipeline():
    imported = {name for module in MODULES if module.split(".")[0] == "tokenizer" for name in imports(module)}
    assert "torch" in imported
    assert "mim" not in {name.split(".")[0] for name in imported}


def test_the_rules_see_imports_in_every_form():
    assert {"mim.data.stream", "mim.config", "tokenizer"} <= imports("mim.build")  # from mim.data import, absolute
    assert "mim.demo" in imports("mim.__main__")  # inside a function
    assert "tokenizer.quantize" in imports("tokenizer.dvae")  # relative


@pytest.mark.parametrize("module", MODULES)
def test_no_module_has_a_name_that_says_nothing(module):
    assert not FORBIDDEN_NAMES & set(module.split("."))


@pytest.mark.parametrize("module", MODULES)
def test_nothing_that_is_read_is_executed(module):
    assert not FORBIDDEN_IMPORTS & {name.split(".")[0] for name in imports(module)}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            allowed = call == "torch.load" and module == READS_PICKLES
            assert call not in FORBIDDEN_CALLS or allowed, ast.unparse(node)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert options.get("shell") in (None, "False"), ast.unparse(node)
            assert options.get("allow_pickle") in (None, "False"), ast.unparse(node)
            assert options.get("weights_only") in (("True",) if allowed else (None, "True")), ast.unparse(node)
