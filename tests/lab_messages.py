"""Every message that the lab's errors can carry, read out of its source: what tests/test_troubleshooting.py holds the documentation to.

A message is followed from where an error is made (`ConfigError(…)`, `from_problems(…)`) back to its words: through names, lists of
problems, helper functions and the arguments that they are called with. What is filled in at run time stands as `…`.
"""

import ast
import re
from itertools import product
from pathlib import Path

ERRORS = {"DistillError", "ConfigError", "DataError", "PreflightError", "BackendError"}
FAULT = "Fault"  # what a failed EasyDistill looks like, whose name goes into an error
FILLED = "…"
# They cut or decorate what others say, or say what to do.
DECORATION = {"shortened", "did_you_mean", "shown", "tail", "setup_call", "_abilities", "advice"}
PROBLEMS = ("problem", "problems")  # so end the names of functions and of lists that hold what `from_problems` shows
LEAST_WORDS = 3  # of a part of a message, to be an entry of its own
LIMIT = 12  # ways in which one text may begin


def messages(folder: Path) -> dict[str, str]:
    """Template → "module:line" of every message of the modules in `folder`; a reason that a message is given is a template of its own."""
    return _Lab(folder).found


def unread(folder: Path) -> list[str]:
    """Where an error is made whose words cannot be told from the source, as "module:line", so that none is missed in silence."""
    return _Lab(folder).unread


def words(template: str) -> list[str]:
    """The literal words of a template."""
    return [word for word in template.replace(FILLED, " ").split() if any(letter.isalnum() for letter in word)]


class _Lab:
    def __init__(self, folder: Path) -> None:
        self.trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))}
        self.scope, self.module, self.nodes, self.functions, self.methods = {}, {}, {}, {}, {}
        self.constants, self.imports, self.calls = {}, {}, []
        for module, tree in self.trees.items():
            self._index(module, tree)
        self.found, self.unread, self._known, self.callers = {}, [], {}, {}
        for call in self.calls:
            for function in self._targets(call):
                self.callers.setdefault(function, []).append(call)
        for call in self.calls:
            self._collect(call)
        for function in [one for same in self.functions.values() for one in same if one.name.endswith(PROBLEMS)]:
            for value in self._returns(function):
                self._add(self.texts(value) + self.items(value), value)
        for name in [node for node in self.scope if isinstance(node, ast.Name) and node.id.endswith(PROBLEMS)]:
            self._add(self.items(name), name)

    def _index(self, module: str, tree: ast.Module) -> None:
        def visit(node, function) -> None:
            for child in ast.iter_child_nodes(node):
                self.scope[child], self.module[child] = function, module
                if isinstance(child, ast.FunctionDef):
                    self.nodes[child] = list(ast.walk(child))
                    self.functions.setdefault((module, child.name), []).append(child)
                    if child.args.args and child.args.args[0].arg in ("self", "cls"):
                        self.methods.setdefault(child.name, []).append(child)
                if isinstance(child, ast.Call):
                    self.calls.append(child)
                visit(child, child if isinstance(child, ast.FunctionDef) else function)

        visit(tree, None)
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[module, node.targets[0].id] = node.value
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                self.imports |= {(module, alias.asname or alias.name): (node.module, alias.name) for alias in node.names}

    def _collect(self, call: ast.Call) -> None:
        """The messages of one call, where it makes an error."""
        name = _name(call.func)
        if name == "from_problems":
            found = self.items(call.args[1])
        elif name in (*ERRORS, FAULT):
            found = self.texts(call.args[0])
        else:
            return
        self._add(found, call)
        if not any(map(words, found)):
            self.unread.append(f"{self.module[call]}:{call.lineno}")

    def _add(self, templates: list[str], node: ast.AST) -> None:
        for template in templates:
            text = " ".join(template.split())
            if words(text):
                self.found.setdefault(text, f"{self.module[node]}:{node.lineno}")

    # One text

    def texts(self, node: ast.expr) -> list[str]:
        """What a string may be, a template each; empty where nothing is known."""
        return self._once("texts", node, self._texts)

    def items(self, node: ast.expr) -> list[str]:
        """What the texts of a list may be."""
        return self._once("items", node, self._items)

    def _once(self, kind: str, node: ast.expr, find) -> list[str]:
        if (kind, node) not in self._known:
            self._known[kind, node] = []  # for a name that is made from itself
            self._known[kind, node] = find(node)
        return self._known[kind, node]

    def _texts(self, node: ast.expr) -> list[str]:
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return self._joined([self._part(part) for part in parts])
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                both = [self.texts(side) or [FILLED] for side in (left, right)]
                return [] if both == [[FILLED], [FILLED]] else self._joined(both)
            case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join"), args=[ast.List(elts=[first, *_])]):
                return self.texts(first)
            case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join"), args=[listed]):
                return self.items(listed)
            case ast.Call(func=ast.Attribute(value=pattern, attr="format")):
                return [re.sub(r"\{[^{}]*\}", FILLED, text) for text in self.texts(pattern)]
            case ast.Call(func=ast.Name(id="next"), args=[listed, *_]):
                return self.items(listed)
            case ast.Call():
                return [text for value in self._returned(node) for text in self.texts(value)]
        looped = [text for listed in self._run_over(node) for text in self.items(listed)]
        return looped + [text for value in self._meanings(node) for text in self.texts(value)]

    def _part(self, part: ast.expr) -> list[str]:
        """A piece of an f-string: one of the lab's constants as it is; what a helper or a caller fills in is a template of its own."""
        if isinstance(part, ast.Constant):
            return [part.value]
        if _name(getattr(part.value, "func", part.value)) in DECORATION:
            return [FILLED]
        known = self.texts(part.value)
        if self._is_constant(part.value) and 0 < len(known) <= LIMIT:
            return known
        self._add([text for text in known if len(words(text)) >= LEAST_WORDS], part)
        return [FILLED]

    def _is_constant(self, node: ast.expr) -> bool:
        """Whether an expression is one of a module's own constants, or an entry of one."""
        node = node.value if isinstance(node, ast.Subscript) else node
        return isinstance(node, ast.Name) and self._constant(node) is not None

    def _joined(self, parts: list[list[str]]) -> list[str]:
        joined = ("".join(chosen) for chosen in product(*parts))
        return [text.replace(FILLED * 3, FILLED).replace(FILLED * 2, FILLED) for text in joined]

    # A list of texts

    def _items(self, node: ast.expr) -> list[str]:
        match node:
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                each = [self.items(one.value) if isinstance(one, ast.Starred) else self.texts(one) for one in elements]
                return [text for found in each for text in found]
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element):
                return self.texts(element)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self.items(left) + self.items(right)
            case ast.Call(func=ast.Name(id="list" | "sorted" | "tuple"), args=[listed, *_]):
                return self.items(listed)
            case ast.Call():
                return [text for value in self._returned(node) for text in self.items(value)]
            case ast.Name():
                appended = [text for value in self._appended(node) for text in self.texts(value)]
                return appended + [text for value in self._meanings(node) for text in self.items(value)]
        return [text for value in self._meanings(node) for text in self.items(value)]

    # What names and calls stand for

    def _meanings(self, node: ast.expr) -> list[ast.expr]:
        """The expressions that an expression may stand for."""
        match node:
            case ast.IfExp(body=body, orelse=otherwise):
                return [body, otherwise]
            case ast.BoolOp(values=values):
                return values
            case ast.NamedExpr(value=value):
                return [value]
            case ast.Subscript(value=ast.Name() as name, slice=key):
                constant = self._constant(name)
                pairs = zip(constant.keys, constant.values, strict=True) if isinstance(constant, ast.Dict) else []
                return [value for known, value in pairs if not isinstance(key, ast.Constant) or ast.unparse(known) == ast.unparse(key)]
            case ast.Name():
                return self._assigned(node) + self._given(node) + ([constant] if (constant := self._constant(node)) else [])
        return []

    def _constant(self, name: ast.Name) -> ast.expr | None:
        key = (self.module[name], name.id)
        return self.constants.get(self.imports.get(key, key))

    def _assigned(self, name: ast.Name) -> list[ast.expr]:
        """What is assigned to a name in its function, by itself, as a part of a tuple, or as what a loop runs over."""
        values = []
        for node in self._around(name):
            match node:
                case ast.Assign(targets=[target], value=value) | ast.NamedExpr(target=target, value=value):
                    values += self._bound(target, value, name.id)
                case ast.AugAssign(target=ast.Name(id=known), value=value) if known == name.id:
                    values.append(value)
                case ast.For(target=ast.Tuple() as target, iter=listed) | ast.comprehension(target=ast.Tuple() as target, iter=listed):
                    values += [found for row in self._rows(listed) for found in self._bound(target, row, name.id)]
        return values

    def _rows(self, listed: ast.expr) -> list[ast.expr]:
        """The entries of a list that is written down, or made by a comprehension, at its place or where a name is given it."""
        if isinstance(listed, ast.Name):
            places = [node for node in self._around(listed) if isinstance(node, ast.Assign)]
            values = [node.value for node in places if ast.unparse(node.targets[0]) == listed.id] + [self._constant(listed)]
            return [row for value in values if value is not None and not isinstance(value, ast.Name) for row in self._rows(value)]
        return getattr(listed, "elts", None) or ([listed.elt] if isinstance(listed, ast.ListComp) else [])

    def _run_over(self, name: ast.expr) -> list[ast.expr]:
        """The lists that a name, by itself, runs over in its function."""
        loops = [node for node in self._around(name) if isinstance(node, ast.For | ast.comprehension)] if isinstance(name, ast.Name) else []
        return [loop.iter for loop in loops if isinstance(loop.target, ast.Name) and loop.target.id == name.id]

    def _around(self, name: ast.Name) -> list[ast.AST]:
        """Every node of the function that a name stands in."""
        return self.nodes.get(self.scope[name], [])

    def _bound(self, target: ast.expr, value: ast.expr, name: str) -> list[ast.expr]:
        if isinstance(target, ast.Name):
            return [value] if target.id == name else []
        if not isinstance(target, ast.Tuple):
            return []
        places = [place for place, one in enumerate(target.elts) if isinstance(one, ast.Name) and one.id == name]
        sources = self._returned(value) if isinstance(value, ast.Call) else [value]
        return [source.elts[place] for place in places for source in sources if isinstance(source, ast.Tuple) and place < len(source.elts)]

    def _appended(self, name: ast.Name) -> list[ast.expr]:
        calls = [node for node in self._around(name) if isinstance(node, ast.Call)]
        return [call.args[0] for call in calls if ast.unparse(call.func) == f"{name.id}.append"]

    def _given(self, name: ast.Name) -> list[ast.expr]:
        """The arguments that a function's parameter is called with."""
        function = self.scope[name]
        if function is None:
            return []
        own = [argument.arg for argument in function.args.args if argument.arg not in ("self", "cls")]
        named = own + [argument.arg for argument in function.args.kwonlyargs]
        if name.id not in named:
            return []
        values = []
        for call in self.callers.get(function, []):
            values += [keyword.value for keyword in call.keywords if keyword.arg == name.id]
            values += [given for parameter, given in zip(own, call.args, strict=False) if parameter == name.id]
        return values

    def _targets(self, call: ast.Call) -> list[ast.FunctionDef]:
        """The lab's functions that a call may mean: by the module that is named, the import, or any method of that name."""
        module, name = self.module[call], _name(call.func)
        if isinstance(call.func, ast.Name):
            return self.functions.get(self.imports.get((module, name), (module, name)), [])
        if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.func.value.id in self.trees:
            return self.functions.get((call.func.value.id, name), [])
        return self.methods.get(name, [])

    def _returned(self, call: ast.Call) -> list[ast.expr]:
        if _name(call.func) in DECORATION:
            return []
        return [value for target in self._targets(call) for value in self._returns(target)]

    def _returns(self, function: ast.FunctionDef) -> list[ast.expr]:
        own = [node for node in ast.walk(function) if isinstance(node, ast.Return) and self.scope[node] is function]
        return [node.value for node in own if node.value is not None]


def _name(node) -> str:
    return getattr(node, "id", None) or getattr(node, "attr", None) or ""
