"""Sphinx extension: the API reference, from signatures and docstrings, when the book is built.

The package is read, not imported, so that the page is the same on every machine and never late.
``book/api.md`` is its head; a line ``<!-- every name -->`` there is replaced by all the rest.
As a script, ``python book/api.py`` prints the page.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from textwrap import dedent
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dnal_mini"
PAGE = Path(__file__).parent / "api.md"
# In the order in which the book needs them; modules that no part names follow at the end.
PARTS = {
    "The gate": ["gating", "layers"],
    "Images and training": ["data", "training"],
    "The search": ["search", "config", "recipes", "methods"],
    "Counting and measuring": ["measure"],
    "The cut": ["pruning", "graph"],
    "Other places": ["deployment"],
    "Networks": ["models"],
    "Runs and records": ["runs", "cli", "__main__"],
    "Figures": ["figures"],
}  # fmt: skip
CONTRACT = [
    "add_gates", "gates", "set_gates", "ScaledSigmoid", "delta_schedule", "analyse", "prune",
    "Pruned", "save", "load", "cost", "Cost", "latency", "Latency", "compare", "Comparison",
    "deploy", "export", "run", "SearchConfig",
]  # fmt: skip
FIELD = re.compile(r"^(Source|Differs|Raises|Example|Row|Rows|Run|Keys|Table):", re.MULTILINE)
MARK = "<!-- every name -->"


@dataclass(frozen=True)
class Entry:
    """A function, a class, a method or a property, as the page shows it."""

    name: str
    signature: str
    docstring: str
    fields: list[tuple[str, str, str]] = field(default_factory=list)  # of a dataclass
    members: list["Entry"] = field(default_factory=list)


# --- reading the source ----------------------------------------------------------------------


@lru_cache
def modules() -> list[str]:
    """Dotted names of all modules of the package, without the package's own name."""
    paths = [p.relative_to(PACKAGE).with_suffix("") for p in PACKAGE.rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    return sorted(names - {"__init__"})


@lru_cache
def parse(module: str) -> ast.Module:
    """The source of a module as a tree."""
    base = PACKAGE.joinpath(*module.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


@lru_cache
def entries(tree: ast.Module) -> list[Entry]:
    """The public functions and classes of a module, in its own order."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found.append(function(node))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found.append(a_class(node))
    return found


def function(node: ast.FunctionDef) -> Entry:
    """A function or method; ``self`` is left out."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    decorators = [ast.unparse(each) for each in node.decorator_list]
    if "property" in decorators or "cached_property" in decorators:
        return Entry(node.name, f"{node.name}{returns.replace(' ->', ':')}", doc(node))
    shown = arguments(node)
    line = f"{node.name}({', '.join(shown)}){returns}"
    if len(line) > 88:  # one argument in a line
        line = f"{node.name}(\n" + "".join(f"    {each},\n" for each in shown) + f"){returns}"
    return Entry(node.name, line, doc(node))


def arguments(node: ast.FunctionDef) -> list[str]:
    """The arguments of a function as they are written in a signature."""
    args = node.args
    plain = [*args.posonlyargs, *args.args]
    missing = len(plain) - len(args.defaults)
    shown = [argument(a, None if k < missing else args.defaults[k - missing])
             for k, a in enumerate(plain) if a.arg not in ("self", "cls")]  # fmt: skip
    shown += [f"*{argument(args.vararg)}"] if args.vararg else ["*"] if args.kwonlyargs else []
    pairs = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    shown += [argument(each, default) for each, default in pairs]
    shown += [f"**{argument(args.kwarg)}"] if args.kwarg else []
    return shown


def argument(node: ast.arg, default: ast.expr | None = None) -> str:
    """``name: annotation = default``."""
    typed = f": {ast.unparse(node.annotation)}" if node.annotation else ""
    equals = " = " if typed else "="
    return f"{node.arg}{typed}{equals + ast.unparse(default) if default else ''}"


def a_class(node: ast.ClassDef) -> Entry:
    """A class: how it is made, its fields if it is a dataclass, its public methods."""
    decorators = [ast.unparse(each) for each in node.decorator_list]
    data = any(each.startswith("dataclass") for each in decorators)
    methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
    makes = next((function(m).signature for m in methods if m.name == "__init__"), "")
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    signature = re.sub(r"^__init__(.*?)( -> None)?$", rf"{node.name}\1", makes, flags=re.DOTALL)
    members = [function(m) for m in methods if not m.name.startswith("_") and doc(m)]
    line = signature or (node.name if data else f"{node.name}({bases})" if bases else node.name)
    return Entry(node.name, f"class {line}", doc(node), fields(node) if data else [], members)


def fields(node: ast.ClassDef) -> list[tuple[str, str, str]]:
    """Name with annotation, default, and the string below it, of every field of a dataclass."""
    rows = []
    following = [*node.body[1:], None]
    for each, after in zip(node.body, following, strict=True):
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
            words = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                words = str(after.value.value)
            default = ast.unparse(each.value) if each.value else ""
            rows.append((f"{each.target.id}: {ast.unparse(each.annotation)}", default, words))
    return rows


def doc(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """The docstring without its indentation; "" without one."""
    return ast.get_docstring(node) or ""


def exported() -> dict[str, str]:
    """The names of ``dnal_mini.__all__`` and the module that each one comes from."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    where: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module != "dnal_mini":
            source = (node.module or "").removeprefix("dnal_mini.")
            where |= {alias.name: source for alias in node.names}
    for name, module in where.items():  # a name may be handed on: search.SearchConfig
        if module in modules() and name not in {e.name for e in entries(parse(module))}:
            homes = [m for m in modules() if name in {e.name for e in entries(parse(m))}]
            where[name] = homes[0] if homes else module
    return where


def notebooks() -> dict[str, str]:
    """Code of each notebook by the number in its name."""
    found = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        found[path.stem] = "\n".join(code)
    return found


# --- writing the page ------------------------------------------------------------------------


def escaped(text: str) -> str:
    """A docstring's words as MyST: what is code stays, what would be markup does not become any."""
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    parts = re.split(r"(`[^`]+`)", text)
    for k in range(0, len(parts), 2):
        parts[k] = re.sub(r"([*<$|])", r"\\\1", parts[k])
        parts[k] = re.sub(r"\[([a-z]+\d{4}\w*)\]", r"{cite}`\1`", parts[k])
    return "".join(parts)


def described(docstring: str) -> Iterator[str]:
    """The lines of a docstring on the page: its words, Source, Differs, Raises as a list, code."""
    pieces = FIELD.split(docstring)
    for paragraph in re.split(r"\n\s*\n", pieces[0].strip()):
        lines = [line.strip() for line in paragraph.splitlines()]
        table = any("  " in line for line in lines) and len(lines) > 1
        yield "```text\n" + "\n".join(lines) + "\n```" if table else escaped("\n".join(lines))
        yield ""
    for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
        if name == "Example":
            yield f"\n```python\n{dedent(text).strip()}\n```"
            continue
        words, *rest = re.split(r"\n\s*\n", text.strip())
        yield f"- **{name}** {escaped(' '.join(words.split()))}"
        yield from (f"\n{escaped(' '.join(more.split()))}" for more in rest)
    yield ""


def used_in(name: str, code: dict[str, str]) -> str:
    """Links to the notebooks that call a name."""
    pattern = re.compile(rf"\.{name}\b|^(?:from|import) .*\b{name}\b", re.MULTILINE)
    pages = [stem for stem, source in code.items() if pattern.search(source)]
    links = [f"{{doc}}`{int(stem[:2])} </notebooks/{stem}>`" for stem in pages]
    return f"Used in notebook{'s' * (len(links) > 1)} {', '.join(links)}." if links else ""


def anchor(module: str, name: str) -> str:
    """Label of a name on the page."""
    return f"api-{module}-{name}".replace("__", "").replace(".", "-").replace("_", "-").lower()


def section(module: str, entry: Entry, code: dict[str, str]) -> Iterator[str]:
    """One name of a module."""
    kind = "-class" if entry.signature.startswith("class ") else ""
    yield f"({anchor(module, entry.name)}{kind})="
    yield f"#### `{entry.name}`\n"
    yield f"```python\n{entry.signature}\n```\n"
    yield from described(entry.docstring)
    if entry.fields:
        yield "| field | default | |\n|:--|:--|:--|"
        for typed, default, words in entry.fields:
            typed, default = (text.replace("|", r"\|") for text in (typed, default))
            yield f"| `{typed}` | {f'`{default}`' if default else ''} | {escaped(words)} |"
        yield ""
    for member in entry.members:
        words = " ".join(" ".join(described(member.docstring)).split())
        yield f"- `{' '.join(member.signature.split())}` {words}"
    if entry.members:
        yield ""
    if links := used_in(entry.name, code):
        yield f"{links}\n"


def page() -> str:
    """The whole page."""
    code, where = notebooks(), exported()
    lines = ["| name | in | what it is |", "|:--|:--|:--|"]
    for name in [*CONTRACT, *sorted(set(where) - set(CONTRACT) - set(modules()))]:
        if not (found := [e for e in entries(parse(where[name])) if e.name == name]):
            continue
        kind = "-class" if found[0].signature.startswith("class ") else ""
        link = f"{{ref}}`{name} <{anchor(where[name], name)}{kind}>`"
        first = escaped(re.split(r"\n\s*\n", found[0].docstring)[0])
        lines.append(f"| {link} | `{where[name]}` | {' '.join(first.split())} |")
    parts = {
        title: [m for name in names for m in modules() if m == name or m.startswith(f"{name}.")]
        for title, names in PARTS.items()
    }
    named = [module for part in parts.values() for module in part]
    rest = [module for module in modules() if module not in named]
    for title, part in {**parts, "Further modules": rest}.items():
        lines.append(f"\n## {title}\n")
        for module in (each for each in part if each in modules()):
            tree = parse(module)
            lines += [f"### `{module}`\n", *described(doc(tree))]
            for entry in entries(tree):
                lines += section(module, entry, code)
    names = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"
    return PAGE.read_text(encoding="utf-8").replace(MARK, names)


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx: the page is read anew in every build."""

    def fill(_: Any, docname: str, source: list[str]) -> None:
        if docname == "book/api":
            source[0] = page()

    app.connect("source-read", fill)
    app.connect("env-get-outdated", lambda app, env, *_: {"book/api"} & set(env.found_docs))
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    sys.stdout.write(page())
