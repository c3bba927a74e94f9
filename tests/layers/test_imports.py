"""Who imports whom: torch stays on its side, layers look one way only, pickle is nowhere."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import asyncckpt

ROOT = Path(asyncckpt.__file__).parent
LAYERS = [
    "errors", "format", "policy", "codec", "storage", "catalog", "read", "write", "writer", "snapshot", "distributed",
    "signals", "checkpointer", "integrations", "testing", "cli", "__main__",
]  # fmt: skip
"""What stands later may import what stands earlier, never the other way."""
FACE = {
    "checkpointer", "run", "session", "link", "handle", "progress", "advice", "arguments", "stats", "schedule",
    "preemption", "fetching", "company", "taken", "mirrored", "tiers",
}  # fmt: skip
"""The modules at the top that make up the public surface; one layer."""
TORCH_SIDE = {
    "snapshot", "distributed", "integrations", "checkpointer", "run", "session", "schedule", "fetching", "company",
    "taken",
}  # fmt: skip
NEVER = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
RUNS_CODE = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.load", "numpy.load"}
PICKLED = "asyncckpt.integrations.pickled"
"""The one exception: converts from and to formats that are pickled, when a user asks for that; see its own tests below.
Nothing may import it but what the commands for that do, and these when they are called."""


@dataclass(frozen=True)
class Import:
    """One import. `at_load` says whether it runs when the module is loaded."""

    where: str
    line: int
    target: str
    at_load: bool

    def __str__(self) -> str:
        return f"{self.where}:{self.line} imports {self.target}"


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[Import]:
    """All imports in one module, wherever they stand."""
    tree = ast.parse(MODULES[name].read_text())
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    pending: list[tuple[ast.AST, bool]] = [(tree, True)]
    while pending:
        node, at_load = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_load = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += [(child, False) for child in node.body] + [(child, at_load) for child in node.orelse]
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, node.lineno, alias.name, at_load)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(name, node.lineno, full if full in MODULES else base, at_load)
        pending += [(child, at_load) for child in ast.iter_child_nodes(node)]


ALL = [found for name in MODULES for found in imports(name)]


def top(module: str) -> str:
    """`asyncckpt.write.client` -> `write`; the package itself -> ``."""
    return [*module.split("."), ""][1]


def rank(module: str) -> int:
    name = top(module)
    return LAYERS.index("checkpointer" if name in FACE else name)


def with_parents(module: str) -> set[str]:
    """What loading `module` loads: itself, and the packages around it."""
    parts = module.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))} & MODULES.keys()


def load_torch() -> set[str]:
    """Modules whose loading loads torch."""
    tainted = {i.where for i in ALL if i.at_load and i.target.split(".")[0] == "torch"}
    while True:
        more = {i.where for i in ALL if i.at_load and with_parents(i.target) & tainted} - tainted
        if not more:
            return tainted
        tainted |= more


def test_every_module_has_a_layer() -> None:
    unknown = {top(name) for name in MODULES} - {"", *LAYERS, *FACE, "__main__", "_version"}
    assert not unknown, "give them a place in LAYERS or FACE"


def test_only_the_torch_side_names_torch() -> None:
    assert not [str(i) for i in ALL if i.target.split(".")[0] == "torch" and top(i.where) not in TORCH_SIDE]


def test_only_the_torch_side_loads_torch() -> None:
    assert not {name for name in load_torch() if top(name) not in TORCH_SIDE}
    assert any(top(name) == "snapshot" for name in load_torch())


def test_layers_look_one_way() -> None:
    inner = [i for i in ALL if i.target in MODULES and top(i.where) and top(i.target)]
    assert len(inner) > 50
    assert not [str(i) for i in inner if rank(i.target) > rank(i.where)]


def test_format_and_policy_do_no_io() -> None:
    forbidden = {"socket", "subprocess", "shutil", "tempfile", "mmap", "asyncio", "threading", "os", "io"}
    pure = [i for i in ALL if top(i.where) in {"format", "policy", "codec"}]
    assert not [str(i) for i in pure if i.target.split(".")[0] in forbidden]


def test_nothing_that_runs_code_from_data_is_imported() -> None:
    assert not [str(i) for i in ALL if i.target.split(".")[0] in NEVER and i.where != PICKLED]


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_call_runs_code_from_data() -> None:
    for name in MODULES.keys() - {PICKLED}:
        for called, _ in calls(name):
            assert called not in RUNS_CODE, (name, called)


def test_what_is_pickled_is_read_by_allow_lists_only() -> None:
    for called, node in calls(PICKLED):
        if called == "torch.load":
            assert "weights_only=True" in map(ast.unparse, node.keywords)
        else:
            assert called not in RUNS_CODE - {"torch.save"}
            assert called not in {"pickle.load", "pickle.loads", "pickle.Unpickler"}


def test_only_conversions_reach_what_is_pickled() -> None:
    importers = {i.where: i.at_load for i in ALL if i.target == PICKLED}
    assert importers == {"asyncckpt.cli.importing": False, "asyncckpt.integrations.outgoing": True}
    importers = {i.where: i.at_load for i in ALL if i.target == "asyncckpt.integrations.outgoing"}
    assert importers == {"asyncckpt.cli.exporting": False}


@pytest.mark.parametrize("module", ["asyncckpt.writer", "asyncckpt", "asyncckpt.read.select", "asyncckpt.cli.app"])
def test_in_a_real_process_torch_is_not_loaded(module: str) -> None:
    code = f"import {module}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_a_machine_of_the_other_byte_order_is_told() -> None:
    code = "import sys; sys.byteorder = 'big'; import asyncckpt"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert told.returncode and "byte order" in told.stderr
