"""Chat templates: programs that come with a model's file, run within limits.

They are rendered as Hugging Face does it
(https://huggingface.co/docs/transformers/chat_templating_writing), in Jinja's sandbox.
The sandbox keeps them from Python's insides, not from taking all time and memory, so
here every step is paid for out of a fixed budget: each turn of a loop, each call, and
each operation by the letters and items that it may produce, before it runs. A budget
counts the same on every machine, as a clock would not.
"""

import datetime
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor
from jinja2 import nodes

MAX_SOURCE = 2**20  # letters of a template; models' own have up to 10**5
MAX_WORK = 10**8  # letters and items that a rendering may make on its way
# What is paid for a node of Jinja's syntax tree each time a loop or a macro runs it, and
# for a call: about a nanosecond a unit, so that the whole budget is a few seconds.
NODE, CALL, MACRO = 10, 300, 1000

# What a template may raise when it meets messages that it was not written for.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,  # RecursionError is one
    SyntaxError,  # of the Python code that Jinja makes
    TypeError,
    ValueError,
)


def render(
    source: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, Any]
) -> str:
    """What a template makes of a conversation.

    Args:
        source: The template.
        messages: Mostly ``{"role": "user", "content": "..."}``.
        names: Other names it knows.

    Raises:
        ValueError: Messages are no list of mappings, or the template is damaged,
            refuses, fails, or would take more than its budget.
    """
    check_messages(messages)
    if len(source) > MAX_SOURCE:
        raise ValueError(
            f"the model's chat template has {len(source)} letters, over {MAX_SOURCE}."
        )
    try:
        environment = _Environment()
        code = environment.compile(environment.metered(source))
        template = jinja2.Template.from_code(environment, code, environment.globals)
        return template.render({**names, "messages": messages})
    except _FAILURES as error:
        raise ValueError(
            "the model's chat template does not take these messages: "
            f"{str(error) or type(error).__name__}"
        ) from error


def check_messages(messages: Any) -> None:
    """Raises ValueError unless they are a list of mappings."""
    wanted = 'a list of messages like {"role": "user", "content": "..."}'
    if isinstance(messages, str | bytes | Mapping) or not isinstance(
        messages, Sequence
    ):
        raise ValueError(f"a conversation is {wanted}; got {type(messages).__name__}.")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"a conversation is {wanted}; message {number} is of type "
                f"{type(message).__name__}."
            )


class _TooMuch(jinja2.TemplateError):
    """The budget is spent."""


# How much something is


def _length(value: Any) -> int:
    """Letters or items of a value, not of what is inside them."""
    sized = isinstance(
        value, str | bytes | range | Mapping | Sequence | set | frozenset
    )
    return 1 + len(value) if sized else 1


def _weight(value: Any, known: dict[int, int] | None = None) -> int:
    """Letters and items of a value written out, with all that is inside.

    A part that occurs several times counts each time, but is looked at once: templates
    can nest a list in itself 60 times over with 60 parts.
    """
    if isinstance(value, str | bytes | range) or not isinstance(
        value, Iterable | jinja2.utils.Namespace
    ):
        return _length(value)
    known = {} if known is None else known
    if id(value) not in known:  # all parts live as long as the value does
        known[id(value)] = 0  # of a cycle, which nothing can write out
        parts: Iterable[Any] = ()
        if isinstance(value, jinja2.utils.Namespace):
            parts = object.__getattribute__(value, "_Namespace__attrs").values()
        elif isinstance(value, Mapping):
            parts = itertools.chain(value.keys(), value.values())
        elif isinstance(value, Sequence | set | frozenset):
            parts = value
        known[id(value)] = 1 + sum(_weight(part, known) for part in parts)
    return known[id(value)]


def _times(value: Any) -> int:
    """By how much an argument can multiply a text: its size, if it is a number."""
    return abs(value) if isinstance(value, int) else _weight(value)


def _format_work(text: str, args: Sequence[Any]) -> int:
    """Of ``%`` and ``format``, which may fill fields up to any width."""
    found = re.findall(r"[%{:][^A-Za-z%{}]{0,9}?(\d+)", text)
    widths = [int(width[:18]) for width in found]
    if "*" in text or re.search(r"\{[^{}]*\{", text):  # taken from the arguments
        widths += [abs(arg) for arg in args if isinstance(arg, int)]
    return (_length(text) + sum(map(_weight, args))) * max(1, *widths, 1)


# Filters and methods whose result may be as large as a product of what they are given;
# all others make no more than the sum.
_GROWING = frozenset(
    (
        *("replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs"),
        *("indent", "wordwrap", "truncate", "batch", "slice", "tojson", "round"),
        "translate",
    )
)
# Filters and tests that look at a sequence's items, not inside.
_SHALLOW = frozenset(
    (
        *("length", "count", "first", "last", "list", "map", "select", "reject"),
        *("selectattr", "rejectattr", "reverse", "default", "d", "items", "attr"),
        *("dictsort", "sort", "unique", "min", "max", "sum", "random", "groupby"),
        *("defined", "undefined", "none", "string", "mapping", "iterable", "sequence"),
        *("number", "boolean", "true", "false", "callable", "sameas"),
    )
)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget; made anew for each rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        self.left = MAX_WORK
        self.macro = MACRO  # and what is in the largest one
        self.loop = NODE  # what is in the largest
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            # With the context it is not called ahead, while the template compiles.
            finalize=jinja2.pass_context(lambda _context, value: self._written(value)),
        )
        # Jinja's own filter escapes <, > and & for HTML.
        self.filters["tojson"] = _tojson
        self.filters = {
            name: self._paid(name, filter) for name, filter in self.filters.items()
        }
        tests: dict[str, Any] = self.tests
        self.tests = {name: self._paid(name, test) for name, test in tests.items()}
        self.filters["_written"] = self._written
        self.filters["_read"] = self._read
        self.filters["_joined"] = lambda parts: "".join(map(str, parts))
        self.filters["_steps"] = self._steps
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]  # makes filler text of any length

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise _TooMuch(
                "it would take more steps, or make more text, than a template may"
            )

    def _written(self, value: Any) -> Any:
        self.spend(_weight(value))
        return value

    def _read(self, value: Any) -> Any:
        """For what is compared or cut: of a mapping only the keys are looked up."""
        self.spend(_length(value) if isinstance(value, Mapping) else _weight(value))
        return value

    def metered(self, source: str) -> nodes.Template:
        """The syntax tree with payments in it."""
        tree = self.parse(source)
        bodies = (nodes.Macro, nodes.CallBlock, nodes.Block)
        self.macro += max(map(_cost, tree.find_all(bodies)), default=0)
        self.loop = max(map(_cost, tree.find_all(nodes.For)), default=NODE)
        _Metered().visit(tree)
        tree.set_environment(self)
        return tree

    def _steps(self, items: Iterable[Any], cost: int) -> Iterator[Any]:
        for item in items:
            self.spend(cost)
            yield item

    def _pay(self, name: str, values: Sequence[Any]) -> None:
        """For a filter or a method, given what it works on and its arguments."""
        if name == "format":
            self.spend(_format_work(str(values[0]), values[1:]))
        elif name in _GROWING:
            most = max(map(_times, values[1:]), default=1)
            self.spend(_weight(values[0]) * (most**2 if name == "round" else most))
        else:
            self.spend(sum(map(_length if name in _SHALLOW else _weight, values)))

    def _paid(self, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
        # Some are given the context or the environment first.
        skip = int(hasattr(filter, "jinja_pass_arg"))

        @functools.wraps(filter)
        def paid(*args: Any, **kwargs: Any) -> Any:
            self.spend(CALL)
            self._pay(name, [*args[skip:], *kwargs.values()])
            return filter(*args, **kwargs)

        return paid

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template comes here: of macros, methods and globals."""
        runs = jinja2.runtime.Macro | jinja2.runtime.BlockReference
        self.spend(self.macro if isinstance(obj, runs) else CALL)
        name, owner = getattr(obj, "__name__", ""), getattr(obj, "__self__", None)
        if isinstance(obj, jinja2.runtime.LoopContext):  # of a recursive loop
            self.spend(MACRO)
            args = tuple(self._steps(arg, self.loop) for arg in args)
        elif name in _GROWING or isinstance(obj, type):  # dict and namespace
            self._pay(name, [owner, *args, *kwargs.values()])
        else:
            self.spend(sum(map(_length, (owner, *args))))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's ``str.format``, paid for."""
        if (wrapped := super().wrap_str_format(value)) is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            self._pay("format", [value.__self__, *args, *kwargs.values()])
            return wrapped(*args, **kwargs)

        return formatted

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.spend(_binop_work(operator, left, right))
        return super().call_binop(context, operator, left, right)


def _binop_work(operator: str, left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length(), right.bit_length()
        if operator == "**":
            return (bits[0] * max(right, 0)) ** 2 // 64
        return bits[0] * bits[1] // 64 if operator == "*" else 1
    if operator == "*":
        return _times(left) * _times(right)
    if operator == "%" and isinstance(left, str):
        return _format_work(left, right if isinstance(right, tuple) else (right,))
    return _weight(left) + _weight(right)


def _cost(node: nodes.Node) -> int:
    return NODE * sum(1 for _ in node.find_all(nodes.Node))


class _Metered(jinja2.visitor.NodeTransformer):
    """Puts filters that pay around what the environment does not see otherwise."""

    def _filtered(self, node: Any, name: str, *args: Any) -> Any:
        given = [nodes.Const(arg) for arg in args]
        return nodes.Filter(node, name, given, [], None, None, lineno=node.lineno)

    def visit_For(self, node: Any) -> Any:  # noqa: N802
        cost = _cost(node)
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "_steps", cost)
        return node

    def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._filtered(node.node, "_read")
        return node

    def visit_Compare(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        node.expr = self._filtered(node.expr, "_read")
        for operand in node.ops:
            operand.expr = self._filtered(operand.expr, "_read")
        return node

    def visit_Concat(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return self._filtered(self._filtered(parts, "_written"), "_joined")

    def visit_TemplateData(self, node: Any) -> Any:  # noqa: N802
        # The template's own text would not be finalized, hence not paid for.
        return nodes.Const(node.data, lineno=node.lineno)

    def visit_List(self, node: Any) -> Any:  # noqa: N802
        self.generic_visit(node)
        return self._filtered(node, "_written")

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: Any) -> Any:  # noqa: N802
        return node if node.ctx != "load" else self.visit_List(node)


def _tojson(
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: Any = False,
) -> str:
    """Hugging Face's filter, whose first argument is not Jinja's ``indent``."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the model's own words for training, and adds none."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
