"""Mutation testing: is there a test that fails when a line says something else?   python tests/mutants.py [FILE ...]

mutmut's operators (pip install coverage mutmut), a negated condition for each `if`, and each call that stands alone
left out; not in texts of messages, docstrings, and types. mutmut itself takes no function with a decorator, no table
and no class in a class, of which the reading of checkpoints is made. Here a mutant is a fork of a pytest that has run
once: functions get other code, a table has its module run again. Of the tests those run that reach the changed lines.

Survivors are printed as a diff; the last line counts. A mutant is only looked for in the tests below, in this process.
"""

from __future__ import annotations

import argparse
import collections
import difflib
import gc
import itertools
import os
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any, Iterator

import coverage
import pytest

ROOT = Path(__file__).resolve().parent.parent
READING = ["unit/test_checkpoints.py", "unit/test_guard.py", "robustness/test_hostile_files.py"]
TESTS = {
    "norm": ["unit/test_norm.py"],
    "profiling": ["unit/test_profiling.py"],
    "checkpoints/fold": ["unit/test_fold.py"],
    "hooks": ["unit/test_hooks.py", "unit/test_errors.py", "unit/test_watch.py", *READING],
    "checkpoints/files": READING,
    "checkpoints/checks": READING,
    "checkpoints/unpickling": READING,
    "checkpoints/guard": READING,
}
SECONDS = 60  # a mutant that takes longer counts as found


def mutants(source: str) -> Iterator[tuple[int, int, str]]:
    """First and last line of what is changed, and the source with it."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.mutators import mutation_operators

    wrapper = MetadataWrapper(cst.parse_module(source))
    positions = wrapper.resolve(PositionProvider)
    module = wrapper.module
    found: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        if isinstance(node, (cst.Annotation, cst.Raise, cst.Import, cst.ImportFrom, cst.FormattedString)):
            return
        if isinstance(node, cst.Expr):
            if isinstance(node.value, (cst.SimpleString, cst.ConcatenatedString)):
                return
            if isinstance(node.value, cst.Call):
                found.append((node, node.with_changes(value=cst.Name("None"))))
        if isinstance(node, cst.Call) and getattr(node.func, "value", None) in ("AdminError", "cast"):
            return
        if isinstance(node, (cst.If, cst.While)):
            test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
            found.append((node, node.with_changes(test=cst.UnaryOperation(cst.Not(), test))))
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                others = list(operator(node))
                if kind is cst.BaseString:
                    others = others[:1]  # other capitals are no other mistake than other letters
                elif operator.__name__ == "operator_arg_removal":  # of named ones; None in the place of others
                    pairs = [(other, itertools.zip_longest(node.args, other.args)) for other in others]
                    changed = [next(one for one, another in pair if one is not another) for _, pair in pairs]
                    others = [
                        other
                        for other, argument in zip(others, changed)
                        if bool(argument.keyword) == (len(other.args) < len(node.args))
                    ]
                found.extend((node, other) for other in others)
        for child in node.children:
            visit(child)

    visit(module)
    starts = [0, *itertools.accumulate(len(line) for line in source.splitlines(keepends=True))]
    seen = {source}
    for node, other in found:
        if isinstance(node, (cst.If, cst.While)):
            node, other = node.test, other.test
        if node in positions:
            place = positions[node]
            start, end = (starts[each.line - 1] + each.column for each in (place.start, place.end))
            code = source[:start] + module.code_for_node(other).strip() + source[end:]
            if code not in seen:
                seen.add(code)
                yield place.start.line, place.end.line, code


def parts(code: types.CodeType, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], types.CodeType]]:
    yield path, code
    nested = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    for number, each in enumerate(nested):
        yield from parts(each, (*path, number))


def own(code: types.CodeType) -> Any:
    """What a function does, without those in it."""
    consts = [each.co_name if isinstance(each, types.CodeType) else (type(each), each) for each in code.co_consts]
    return (
        code.co_code,
        consts,
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        code.co_exceptiontable,
    )


class Mutants:
    def __init__(self, name: str, every: int, only: set[int], budget: float, tables: bool) -> None:
        self.path = ROOT / "admin_fairseq" / f"{name}.py"
        self.module = "admin_fairseq." + name.replace("/", ".")
        self.source = self.path.read_text(encoding="utf-8")
        self.every, self.only, self.budget, self.tables = every, only, budget, tables
        self.failed = False
        self.reached: dict[Any, set[int]] = collections.defaultdict(set)
        self.seconds: dict[Any, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = session.items
        self.first = items[0]  # what stays set up for it is there in every fork
        tracer = coverage.Coverage(data_file=None, config_file=False, include=[str(self.path)])
        for number, item in enumerate(items):
            began = time.process_time()
            tracer.start()
            self._run(item, items[(number + 1) % len(items)])
            tracer.stop()
            self.reached[item] = set(tracer.get_data().lines(str(self.path)) or ())
            tracer.erase()
            self.seconds[item] = time.process_time() - began
            if self.failed:
                raise session.Failed(f"{item.nodeid} fails without a mutant")
        items = sorted((item for item in items if self.reached[item]), key=self.seconds.__getitem__)
        print(f"\n{self.path.name}: {len(items)} tests, {sum(map(self.seconds.get, items)):.1f} s", file=sys.__stderr__)
        self._functions()
        assert not self._fork(self.source, items[:3], False), "the tests fail in a fork without a mutant"
        self.all = self._affordable(items)
        self.runs_again = self.tables and not self._fork(self.source, self.all, True)
        if self.tables and not self.runs_again:
            print("the tests fail when the module is run again: no table is mutated", file=sys.__stderr__)
        counts: dict[str, int] = collections.Counter()
        for number, (first, last, code) in enumerate(mutants(self.source)):
            lines = set(range(first, last + 1))
            if number % self.every or (self.only and not self.only & lines):
                continue
            chosen = self._affordable([item for item in items if lines & self.reached[item]])
            result = self._mutant(code, chosen)
            counts[result.partition(" (")[0]] += 1
            if result not in ("killed", "left out", "no change"):
                diff = list(difflib.unified_diff(self.source.splitlines(), code.splitlines(), n=0, lineterm=""))[2:]
                print(f"--- {self.path.name} {result}", *diff, sep="\n", file=sys.__stdout__, flush=True)
        print(f"{self.path.name}: {sum(counts.values())} mutants, {dict(counts)}", file=sys.__stdout__, flush=True)
        return True

    def _affordable(self, items: list[Any]) -> list[Any]:
        """The quickest, in so many seconds, and at least three."""
        spent = list(itertools.accumulate(map(self.seconds.__getitem__, items)))
        return items[: max(3, sum(each <= self.budget for each in spent))]

    def _run(self, item: Any, following: Any) -> None:
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def _functions(self) -> None:
        self.code = dict(parts(compile(self.source, str(self.path), "exec")))
        paths = {(code.co_firstlineno, code.co_name, own(code)[0]): path for path, code in self.code.items()}
        self.functions = []
        for each in gc.get_objects():
            if isinstance(each, types.FunctionType) and each.__code__.co_filename == str(self.path):
                key = each.__code__.co_firstlineno, each.__code__.co_name, each.__code__.co_code
                self.functions.append((each, paths[key]))

    def _mutant(self, code: str, chosen: list[Any]) -> str:
        try:
            new = dict(parts(compile(code, str(self.path), "exec")))
        except SyntaxError:
            return "no change"
        same_parts = new.keys() == self.code.keys()
        changed = {path for path in new if not same_parts or own(new[path]) != own(self.code[path])}
        if not changed:
            return "no change"
        swapped = {path for _, path in self.functions}
        inner = {path for path in changed if any(path[: len(other)] == other for other in swapped)}
        again = (
            not same_parts
            or changed != inner
            or any(
                path in changed and len(new[path].co_freevars) != len(self.code[path].co_freevars) for path in swapped
            )
        )
        if (again and changed != inner) or not chosen:  # a table, or what only an import calls
            again, chosen = True, self.all
        if again != self.tables or (again and not self.runs_again):
            return "left out"
        return "killed" if self._fork(code, chosen, again) else "survives" + " (module run again)" * again

    def _fork(self, source: str, items: list[Any], again: bool) -> bool:
        """Whether a test fails."""
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)
            code = 1
            try:
                compiled = compile(source, str(self.path), "exec")
                self._run_again(compiled) if again else self._swap(dict(parts(compiled)))
                items[0].session._setupstate.teardown_exact(items[0])
                for number, item in enumerate(items):
                    self._run(item, (items[number + 1 :] or [self.first])[0])
                    if self.failed:
                        if os.environ.get("SHOW"):
                            print("by", item.nodeid, file=sys.__stdout__, flush=True)
                        break
                code = int(self.failed)
            finally:
                os._exit(code)
        return os.waitpid(child, 0)[1] != 0

    def _swap(self, new: dict[tuple[int, ...], types.CodeType]) -> None:
        for function, path in self.functions:
            if len(function.__code__.co_freevars) == len(new[path].co_freevars):
                function.__code__ = new[path]

    def _run_again(self, code: types.CodeType) -> None:
        """Whoever has imported from the module gets what it now makes."""
        values = vars(sys.modules[self.module])
        before = {name: value for name, value in values.items() if not name.startswith("__")}
        exec(code, values)
        kinds = (types.FunctionType, type, dict, list, tuple, set, frozenset)
        moved = {
            id(old): values[name]
            for name, old in before.items()
            if isinstance(old, kinds)
            and values.get(name) is not old
            and getattr(old, "__module__", self.module) == self.module
        }
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", {})
            for name, value in list(names.items()):
                if id(value) in moved and names is not values:
                    names[name] = moved[id(value)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*", help=f"of {', '.join(TESTS)}; default: all")
    parser.add_argument("--every", type=int, default=1, help="take one mutant in so many")
    parser.add_argument("--lines", type=int, nargs="*", default=[], help="only those of these lines")
    parser.add_argument(
        "--budget", type=float, default=60, help="seconds of tests that a mutant may take, of the quickest"
    )
    parser.add_argument("--tables", action="store_true", help="those outside functions instead of those inside")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    for name in arguments.files or TESTS:
        tests = [path for path in (f"tests/{each}" for each in TESTS[name]) if os.path.exists(path)]
        child = os.fork()  # pytest imports all anew
        if not child:
            code = pytest.main(
                ["-p", "no:cacheprovider", "-x", "--tb=no", *tests],
                [Mutants(name, arguments.every, set(arguments.lines), arguments.budget, arguments.tables)],
            )
            os._exit(int(code))
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
