"""What BUILD should say: one target a file, whose deps are its imports.

* An import counts wherever it stands in the file, also inside a function.
* `from package import name` depends on the file of the submodule `name`, or
  on the file that the package's lazy tables `_EXPORTS` and `_MODULES` give,
  else on the package's `__init__`. `package.name` after `import package`
  likewise. The lazy tables themselves are no deps of the `__init__`.
* An `__init__` that imports no file of this project is a dep of every file
  below it; any other one only where it is imported, or there were cycles.
* Every test depends on tests/conftest. A test or benchmark may also name
  `:bit_tf` or `:hub_export`, for what it runs in other processes.
"""

import ast
import functools
import importlib.util
import json
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("bit_tf", "hub_export")
FOLDERS = (*PACKAGES, "benchmarks", "tests")

# (file, what it imports) where a dep would be a cycle.
LATE = {
    # `write` takes a model too. Who has a model has bit_tf/models, which
    # reads checkpoints.
    ("bit_tf/checkpoints/__init__", "bit_tf/models"),
}


class Code(str):
    """An expression of BUILD that is no literal, such as a glob."""


@functools.cache
def files() -> tuple[str, ...]:
    """Every source file: its path, without `.py`."""
    return tuple(
        sorted(
            path.relative_to(ROOT).with_suffix("").as_posix()
            for folder in FOLDERS
            for path in (ROOT / folder).rglob("*.py")
        )
    )


@functools.cache
def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8"))


@functools.cache
def _lazy(package: str) -> dict[str, str]:
    """{attribute: module} of a package's `_EXPORTS` and `_MODULES`."""
    table = {}
    for node in _tree(f"{package}/__init__").body:
        match node:
            case ast.Assign([ast.Name("_EXPORTS")], value):
                table |= ast.literal_eval(value)
            case ast.Assign([ast.Name("_MODULES")], value):
                names = ast.literal_eval(value)
                table |= {name: f"{package}.{name}" for name in names}
    return table


def _file_of(module: str) -> str | None:
    path = module.replace(".", "/")
    for file in (path, f"{path}/__init__", f"tests/{path}"):
        if file in files():
            return file
    return None


def _file_of_member(module: str, name: str) -> str | None:
    file = _file_of(f"{module}.{name}")
    if file is None and module in PACKAGES and name in _lazy(module):
        file = _file_of(_lazy(module)[name])
    return file or _file_of(module)


@functools.cache
def imports(file: str) -> frozenset[str]:
    """The files of this project that a file imports, anywhere in it."""
    found = set()
    bound = {}
    parent = file.rpartition("/")[0].replace("/", ".")
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(_file_of(alias.name))
                top = alias.name.partition(".")[0]
                bound[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name(
                "." * node.level + (node.module or ""), parent
            )
            for alias in node.names:
                found.add(_file_of_member(module, alias.name))
    for node in ast.walk(_tree(file)):
        match node:
            case ast.Attribute(ast.Name(name), attribute) if name in bound:
                found.add(_file_of_member(bound[name], attribute))
    return frozenset(found - {None, file})


def parents(file: str) -> list[str]:
    """The `__init__` files that Python runs before a file."""
    folders = pathlib.PurePosixPath(file).parents
    inits = (f"{folder}/__init__" for folder in folders)
    return [init for init in inits if init in files() and init != file]


def _is_test(file: str) -> bool:
    return pathlib.PurePosixPath(file).name.startswith("test_")


def _deps(file: str) -> set[str]:
    found = {name for name in imports(file) if (file, name) not in LATE}
    found |= {init for init in parents(file) if not imports(init)}
    if _is_test(file):
        found.add("tests/conftest")
    return found


def _package_data(file: str) -> str | None:
    """The package whose data the file reads by importlib.resources."""
    for node in ast.walk(_tree(file)):
        match node:
            case ast.Call(
                ast.Attribute(attr="files"), [ast.Constant(str(package))]
            ) if package in PACKAGES:
                return package
    return None


@functools.cache
def rules() -> dict[str, tuple[str, dict]]:
    """BUILD's targets: {name: (kind of rule, {attribute: value})}."""
    found = {}
    text = (ROOT / "BUILD").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        match node:
            case ast.Expr(ast.Call(ast.Name(kind), [], keywords)):
                values = {k.arg: _value(text, k.value) for k in keywords}
            case _:
                continue
        if "name" in values:
            assert values["name"] not in found, f"{values['name']}: twice"
            found[values["name"]] = (kind, values)
    return found


def _value(text: str, node: ast.expr):
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Code(ast.get_source_segment(text, node))


def expected(name: str) -> tuple[str, dict]:
    """(kind, attributes) of a file's target, or a package's."""
    present = rules().get(name, ("", {}))[1]
    if name in PACKAGES:
        deps = {file for file in files() if file.startswith(f"{name}/")}
        values = {"data": [f"{name}/py.typed"]}
        kind = "py_library"
    else:
        deps = _deps(name)
        values = {"srcs": [f"{name}.py"]}
        kind = "py_library"
        if _package_data(name):
            values["data"] = Code(f'glob(["{_package_data(name)}/data/**"])')
        if _is_test(name):
            kind = "py_test"
            values["srcs"] = sorted([f"{name}.py", "run_pytest.py"])
            values |= {"args": [f"{name}.py"], "main": "run_pytest.py"}
        elif name.startswith("tests/"):
            values["imports"] = ["tests"]
        if not name.startswith(PACKAGES):
            deps |= {p for p in PACKAGES if f":{p}" in present.get("deps", ())}
    values |= {"name": name, "srcs_version": "PY3"}
    if deps:
        values["deps"] = sorted(f":{dep}" for dep in deps)
    return kind, values


def stanza(name: str) -> str:
    """The target as BUILD should have it; attributes of its own are kept."""
    kind, values = expected(name)
    values = rules().get(name, ("", {}))[1] | values
    if "deps" not in expected(name)[1]:
        values.pop("deps", None)
    order = {"name": 0, "srcs": 1, "deps": 3}
    lines = [f"{kind}("]
    for attribute in sorted(values, key=lambda a: (order.get(a, 2), a)):
        lines.append(f"    {attribute} = {_spelled(values[attribute])},")
    return "\n".join([*lines, ")"])


def _spelled(value) -> str:
    if isinstance(value, Code):
        return value
    if isinstance(value, list) and len(value) > 1:
        items = "".join(f"        {json.dumps(item)},\n" for item in value)
        return f"[\n{items}    ]"
    return json.dumps(value) if isinstance(value, str | list) else repr(value)


def problem(name: str) -> str | None:
    """What is wrong with a target in BUILD, and what it should be."""
    if name not in rules():
        return f"{name} has no target. Add to BUILD:\n\n{stanza(name)}"
    kind, values = rules()[name]
    right_kind, right = expected(name)
    lines = []
    if kind != right_kind:
        lines.append(f"is a {kind}, not a {right_kind}")
    has, needs = set(values.get("deps", [])), set(right.get("deps", []))
    lines += [f"− missing dep {dep!r}" for dep in sorted(needs - has)]
    lines += [f"+ superfluous dep {dep!r}" for dep in sorted(has - needs)]
    for attribute in right:
        if attribute == "deps" and has != needs:
            continue
        if values.get(attribute) != right[attribute]:
            lines.append(f"{attribute} = {_spelled(values.get(attribute))}")
    if not lines:
        return None
    text = "\n".join(f"  {line}" for line in lines)
    return f"{name}:\n{text}\nReplace it in BUILD by:\n\n{stanza(name)}"
