"""The layers of the house: a module imports only from lower ones, and nothing executes what it reads."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    {
        "mim.agreement",
        "mim.allocator",
        "mim.attention",
        "mim.batch_norm",
        "mim.blocks",
        "mim.code_loss",
        "mim.config",
        "mim.contracts",
        "mim.drawing",
        "mim.feature_statistics",
        "mim.initialization",
        "mim.interruption",
        "mim.interventions",
        "mim.logistic",
        "mim.masking",
        "mim.patch_statistics",
        "mim.patches",
        "mim.plan_text",
        "mim.requeue",
        "mim.save_stages",
        "mim.schedules",
        "mim.survey",
        "mim.trends",
        "mim.utilization",
        "tokenizer",
    },
    {
        "mim.attention_maps",
        "mim.backbone",
        "mim.baselines",
        "mim.curves",
        "mim.devices",
        "mim.hub",
        "mim.last_block",
        "mim.layouts",
        "mim.log",
        "mim.meeting",
        "mim.optim",
        "mim.resample",
        "mim.segmentation_heads",
        "mim.snapshot",
    },
    {"mim.activity", "mim.advice", "mim.data", "mim.encoders", "mim.hf_layouts", "mim.status"},
    {"mim.hf_head", "mim.objectives", "mim.ranks", "mim.shard_commands", "mim.tracker_kinds", "mim.unmasking"},
    {"mim.board", "mim.checkpoint", "mim.guard", "mim.lease", "mim.sharding", "mim.trackers"},
    {
        "mim.frozen_networks",
        "mim.model_card",
        "mim.movement",
        "mim.report",
        "mim.resume",
        "mim.retention",
        "mim.status_command",
        "mim.stopping",
        "mim.watchdog",
        "mim.weight_files",
    },
    {
        "mim.attendant",
        "mim.checkpoint_commands",
        "mim.classifying_teacher",
        "mim.export_folder",
        "mim.report_command",
        "mim.saver",
        "mim.weights",
    },
    {"mim.build", "mim.released_tokenizers", "mim.timm_head"},
    {"mim.bank", "mim.experiment", "mim.footprint", "mim.job", "mim.judged", "mim.timm_folder"},
    {
        "mim.doctor",
        "mim.feature_cache",
        "mim.hf_processor",
        "mim.inference",
        "mim.launching",
        "mim.loader_speed",
        "mim.make_tokens",
        "mim.rollback",
        "mim.slurm",
        "mim.spread",
    },
    {"mim.bank_writer", "mim.cluster", "mim.exports", "mim.features", "mim.out_of_memory", "mim.token_commands"},
    {"mim.cluster_commands", "mim.codes", "mim.looking", "mim.probes", "mim.subjects"},
    {"mim.backbone_file", "mim.sweep"},
    {"mim.evals", "mim.train"},
    {"mim.demo", "mim.dry_run", "mim.rehearsal"},
    {"mim.plan"},
    {"mim.plan_command"},
    {"mim.__main__"},
]
SIBLINGS_MAY_MEET = {"tokenizer", "mim.data", "mim.report"}  # elsewhere a file knows nothing of the one beside it
FORBIDDEN_NAMES = {"utils", "common", "helper", "helpers", "manager", "base", "core", "misc"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {"torch.load", "os.system", "os.popen", "eval", "exec"}
READS_PICKLES = "mim.weight_files"  # alone, and only with weights_only=True


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
        allowed = own in SIBLINGS_MAY_MEET if other == own else level_of(other) < level_of(own)
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
