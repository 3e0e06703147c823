import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_three_lists_of_dependencies_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = sorted(project["dependencies"])
    lines = [line.strip().removeprefix("- ") for line in (ROOT / "environment.yml").read_text().splitlines()]
    assert (
        sorted(line for line in lines if line in wanted or line.split(">=")[0] in {w.split(">=")[0] for w in wanted})
        == wanted
    )
    assert f"python{project['requires-python']}" in lines
    pip = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert sorted(pip) == wanted


def test_imports_run_one_way():
    """model and dataloaders know nothing of each other, nor of what drives a run."""
    leaves = {"utils.errors", "utils.options", "utils.random_streams", "utils.atomic", "utils.tensors"}
    for folder, other in (("model", "dataloaders"), ("dataloaders", "model")):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    modules = [f"utils.{a.name}" for a in node.names] if node.module == "utils" else [node.module]
                else:
                    modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                for module in modules:
                    assert module.split(".")[0] != other, f"{path} imports {module}"
                    assert not module.startswith("utils") or module in leaves, f"{path} imports {module}"
