"""The shape of the house: who may import whom, and who may touch what."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

import lora_param

ROOT = Path(lora_param.__file__).parent
ORDER = [
    "errors",
    "printing",
    "targets.regions",
    "targets.weights",
    "targets.forms",
    "targets.settings",
    "targets.options",
    "targets.lora_config",
    "targets.patterns",
    "targets.matching",
    "targets.selection",
    "targets.plan",
    "fingerprint",
    "files",
    "weight",
    "names.table",
    "names.resolve",
    "names.flat",
    "adapter",
    "names.rewritten",
    "names.split",
    "names.fuse",
    "names.stack",
    "names.relayout",
    "names.fit",
    "model.weights",
    "model.lora",
    "model.held",
    "model.cache",
    "model.loading",
    "model.chains",
    "model.injected",
    "model.attach",
    "model.sites",
    "model.switching",
    "model.state",
    "model.pretrained",
    "model.record",
    "model.adapters",
    "model.baking",
    "model.snapshot",
    "model.trial",
    "checkpoint",
    "formats",
    "consumers",
    "arithmetic",
    "report.figures",
    "verification",
    "report",
    "api_files",
    "api",
    "demo",
    "cli",
    "__main__",
]
PACKAGES = (
    "",
    "targets",
    "names",
    "model",
    "report",
)  # docstrings; their files are listed
FILES = sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in FILES}


def imports(path: Path) -> set[str]:
    """Every import in a file, function-local and typing-only ones included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def inner_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    names = {i.removeprefix("lora_param.") for i in imports(path) if i.startswith("lora_param.")}
    return {name for name in names if name in MODULES}


def floor(module: str) -> int:
    return next(i for i, o in enumerate(ORDER) if module == o or module.startswith(f"{o}."))


@pytest.mark.parametrize("module", [m for m in MODULES if m not in PACKAGES])
def test_a_file_imports_only_from_above(module: str) -> None:
    for other in inner_imports(MODULES[module]):
        if other in PACKAGES:
            continue
        assert floor(other) <= floor(module), f"{module} imports {other}, which is below it"
        # checkpoint.module is the one checkpoint that is a live model, and lists its weights
        if module.startswith("checkpoint") and other != "model.weights":
            assert not other.startswith("model"), f"{module} imports {other}: they meet in adapter"


def test_there_is_no_import_cycle() -> None:
    graph = {m: inner_imports(p) - {m} for m, p in MODULES.items() if m}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path, module])
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("typer", ("cli",)),
        ("click", ("cli",)),
        ("rich", ("cli", "report", "demo", "printing")),
        ("matplotlib", ("report.page",)),
        ("jinja2", ("report.page",)),
        ("torch.nn.utils.parametrize", ("model.chains", "model.injected", "model.attach")),
        ("safetensors", ("files",)),
        ("fsspec", ("files",)),
        ("huggingface_hub", ("files",)),
    ],
)
def test_a_library_stays_in_its_wing(library: str, allowed: tuple[str, ...]) -> None:
    for module, path in MODULES.items():
        used = any(i == library or i.startswith(f"{library}.") for i in imports(path))
        assert not used or module.startswith(allowed), f"{module} imports {library}"


FULL = 320  # lines, from which on a file says why it is one


def test_a_long_file_says_why_it_is_one() -> None:
    for module, path in MODULES.items():
        text = path.read_text()
        told = "one file" in (ast.get_docstring(ast.parse(text)) or "")
        assert told or len(text.splitlines()) <= FULL, f"{module} is long and does not say why"


def test_private_names_of_torch_are_looked_up_in_one_file() -> None:
    for module, path in MODULES.items():
        used = re.findall(r"\btorch\._C\b|forward_ad\._\w+", path.read_text())
        assert not used or module == "weight.private", f"{module} uses {used}"


HEAVY = (
    "fsspec",
    "huggingface_hub",
    "torch",
    "numpy",
    "rich",
    "typer",
    "matplotlib",
    "safetensors",
    "jinja2",
    "markupsafe",
)


def imported(nodes: Sequence[ast.AST]) -> set[str]:
    """The modules that import statements name, a module of this package by its own name."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            ours = {name for name in full if name.removeprefix("lora_param.") in MODULES}
            found |= ours or {str(node.module)}
    return {name.removeprefix("lora_param.") for name in found}


def brings(module: str, seen: set[str]) -> set[str]:
    """The heavy libraries that importing a module brings along."""
    if (root := module.partition(".")[0]) in HEAVY:
        return {root}
    if module not in MODULES or module in seen:
        return set()
    seen.add(module)
    parts = module.split(".")
    parents = {".".join(parts[:i]) for i in range(1, len(parts))}
    others = imported(ast.parse(MODULES[module].read_text()).body) | parents
    return set().union(*(brings(other, seen) for other in others))


@pytest.mark.parametrize("module", [m for m in MODULES if m])
def test_an_import_is_local_only_where_it_keeps_a_library_out(module: str) -> None:
    own = brings(module, set())
    for function in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = imported([node])
                spared = set().union(*(brings(name, set()) for name in named)) - own
                assert spared or named == {"lora_param"}, f"{function.name} imports {named}"


def test_the_public_names_are_sorted_and_there() -> None:
    assert lora_param.__all__ == [*sorted(lora_param.__all__[:-1]), "__version__"]
    for a, b in pairwise(lora_param.__all__[:-1]):
        assert a < b
    for name in lora_param.__all__:
        assert getattr(lora_param, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lora_param.nothing


def test_the_public_names_are_these() -> None:
    assert set(lora_param.__all__) == {
        "Adapter",
        "BakeReport",
        "Diff",
        "ExtractReport",
        "LoRA",
        "LoraParamError",
        "Plan",
        "Stats",
        "UserError",
        "Verdict",
        "Verification",
        "__version__",
        "apply",
        "apply_checkpoint",
        "attach",
        "bake",
        "bake_checkpoint",
        "cached",
        "check",
        "combine",
        "diff",
        "extract",
        "resize",
        "base_state_dict",
        "convert",
        "disable",
        "disabled",
        "enable",
        "get_adapter",
        "load",
        "merged_state_dict",
        "param_groups",
        "parameters",
        "plan",
        "read_adapter",
        "remove",
        "save",
        "save_pretrained",
        "set_scale",
        "stats",
        "verify",
        "write_adapter",
    }


def test_every_public_thing_is_documented() -> None:
    for name in lora_param.__all__:
        value = getattr(lora_param, name)
        assert name == "__version__" or len(value.__doc__ or "") > 40, name


def test_every_exception_is_in_the_tree() -> None:
    from lora_param import errors

    drawn = errors.__doc__ or ""
    for name in errors.__all__:
        assert name in drawn, name
        assert issubclass(getattr(errors, name), errors.LoraParamError)
