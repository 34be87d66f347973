"""Hugging Face's dialect of Jinja, in which chat templates are written.

It adds `{% generation %}` blocks, `{% break %}` and `{% continue %}`, a `tojson` that does not
escape HTML, `raise_exception`, `strftime_now`, and names of control tokens as text. A template runs
in a sandbox, cannot read files or change its variables, and is stopped if it takes too long or
writes too much.
"""

import contextvars
import json
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateRuntimeError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_SECONDS = 5.0
MOST_CHARS = 2**24
MOST_BITS = 4096

_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline")
"""Time by which the template that this context renders must be done."""


class CompiledTemplate:
    """A template that can be rendered many times, in any thread.

    Args:
        marks: Replacements of texts that the template itself writes; texts of variables stay.
        generation: Texts that are written before and after each `{% generation %}` block.

    Raises:
        jinja2.TemplateError, SyntaxError: The source cannot be compiled.
    """

    def __init__(
        self, source: str, marks: Mapping[str, str], generation: tuple[str, str] = ("", "")
    ) -> None:
        environment = _Environment(generation)
        tree = environment.parse(source)
        self.variables = meta.find_undeclared_variables(tree)
        """Names of variables that the template reads."""
        _mark(tree, marks)
        for loop in list(tree.find_all(nodes.For)):
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))
        tree.set_environment(environment)
        self.globals = environment.make_globals(None)
        self._template = Template.from_code(environment, environment.compile(tree), self.globals)

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the text. Raises jinja2.TemplateError and errors of expressions."""
        token = _deadline.set(time.monotonic() + MOST_SECONDS)
        try:
            pieces, num_chars = [], 0
            for piece in self._template.generate(**variables):
                _tick()
                num_chars += len(piece)
                _require_short(num_chars)
                pieces.append(piece)
            return "".join(pieces)
        finally:
            _deadline.reset(token)


class _Generation(Extension):
    """`{% generation %} .. {% endgeneration %}`, which marks text that a model is trained on."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, after = (
            nodes.Output([nodes.TemplateData(text)]).set_lineno(line)
            for text in self.environment.generation  # type: ignore[attr-defined]
        )
        return nodes.Scope([before, *body, after]).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, generation: tuple[str, str]) -> None:
        self.generation = generation
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.filters["tojson"] = _tojson
        self.globals |= {
            "dict": _Dict(),
            "namespace": _Namespace,
            "raise_exception": _raise,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }

    def tick(self) -> None:
        """Stop a template that takes too long. Every iteration of its loops calls this."""
        _tick()

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _tick()
        for value in (*args, *kwargs.values()):
            _require_short(len(value) if isinstance(value, str) else 0)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        is_power = operator == "**" and isinstance(left, int) and isinstance(right, int)
        if is_power and left.bit_length() * right > MOST_BITS:
            raise TemplateRuntimeError(f"it computes a power of more than {MOST_BITS} bits")
        for value, count in ((left, right), (right, left)):
            if operator == "*" and hasattr(value, "__len__") and isinstance(count, int):
                _require_short(len(value) * count)
        return super().call_binop(context, operator, left, right)


class _Namespace(Namespace):
    """Jinja's namespace without access to Python's internals and without long attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise TemplateRuntimeError(f"a namespace may not have the attribute {name!r}")
        _require_short(len(value) if isinstance(value, str) else 0)
        super().__setitem__(name, value)


class _Dict:
    """`dict` without the methods that change a mapping."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _mark(tree: nodes.Template, marks: Mapping[str, str]) -> None:
    """Replace texts by their marks wherever the template itself writes them."""
    for data in tree.find_all(nodes.TemplateData):
        data.data = _replaced(data.data, marks)
    for statement in tree.find_all((nodes.Output, nodes.Assign)):
        for const in statement.find_all(nodes.Const):
            if isinstance(const.value, str):
                const.value = _replaced(const.value, marks)


def _replaced(text: str, marks: Mapping[str, str]) -> str:
    for name in sorted(marks, key=len, reverse=True):
        text = text.replace(name, marks[name])
    return text


def _tick() -> None:
    if time.monotonic() > _deadline.get():
        raise TemplateRuntimeError(f"it takes longer than {MOST_SECONDS:g} seconds")


def _require_short(num_chars: int) -> None:
    if num_chars > MOST_CHARS:
        raise TemplateRuntimeError(f"it writes more than {MOST_CHARS:,} characters")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the escapes that HTML needs."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
