"""Registries of named functions: typed entries whose functions are imported at first use.

A registry holds the package's entries. Plugins add more through the registry's entry-point group: the entry point
names a function, or an `Entry` of the registry's kind to set flags.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mpq.core.consumers import Consumer
from mpq.core.errors import MpqError, expect, nearest_names

if TYPE_CHECKING:
    from mpq.core.cache_formats import CacheFormats
    from mpq.core.layer import Layer
    from mpq.core.scheme import Scheme


@dataclass(frozen=True)
class Entry:
    """A name, one line of documentation, and a function ("module:function", or the function itself).

    A `family` makes functions: the metric "proxy:FORMULA" is what the function of "proxy" returns for FORMULA.
    """

    name: str
    function: str | Callable[..., Any]
    doc: str = ""
    family: bool = False

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        if not isinstance(self.function, str):
            return self.function
        module, _, attribute = self.function.partition(":")
        function: Callable[..., Any] = getattr(import_module(module), attribute)
        return function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function."""
        return self.load()(*arguments, **options)


def _none(layer: "Layer", scheme: "Scheme") -> str:
    return ""


def _no_options(cache: "CacheFormats") -> str:
    return ""


def _all(model: Any) -> bool:
    return True


@dataclass(frozen=True)
class Metric(Entry):
    """A sensitivity metric: `function(task, **options)` gives scores and standard errors, (layers, schemes)."""

    activations: bool = False  # also scores formats of input activations
    second_order: bool = False  # differentiates twice, so the model must fit the device
    measured: bool = False  # a forward pass over the data for each layer and scheme
    compares_losses: bool = False  # a score of 0 is then evidence where other weights change the loss
    rows: str = ""  # "module:function" that scores mixes too: function(task, mixes, **options), the same options


@dataclass(frozen=True)
class Search(Entry):
    """A search: `function(problem, **options)` gives a Frontier."""

    measures: bool = False  # measures losses on a model


@dataclass(frozen=True)
class Target(Entry):
    """A consumer of exported models: `function(request)` writes the files of an `ExportRequest`.

    `objection` says in half a sentence why a layer cannot have a scheme, "" when it can. `schemes` are the well-known
    ones, of which the nearest is named in a refusal; `fallbacks` gives the target's replacements of a scheme that a
    layer cannot have. `takes` says whether it knows a model, `models` in words which ones.
    """

    schemes: tuple[str, ...] = ()
    objection: "Callable[[Layer, Scheme], str]" = _none
    readers: str = ""  # who computes the layers, in words
    mixes: bool = False  # rows of one layer may have formats of their own
    fuses: bool = False  # tied layers (q/k/v, gate/up) must share a scheme
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    takes: Callable[[Any], bool] = _all  # a torch module
    models: str = "any model"
    experts: bool = False  # holds a mixture's experts, each a layer of its own
    packages: tuple[str, ...] = ()  # imported to write its files; installed by mpq's extra `extra`
    extra: str = ""
    sizer: str = ""  # "module:function" of (model, tokenizer, inputs): gives a function from allocations to bytes
    reads: tuple[str, ...] = ()  # fields of the request that take a pass over data: "inputs" to trace with, "ranges"
    consumers: tuple[Consumer, ...] = ()  # programs and versions with which its rules were measured
    command: str = ""  # what serves the folder, "{folder}" in it
    caches: tuple[str, ...] = ()  # cache formats that it serves; ("*",) for all
    caches_alike: str = ""  # "layers": keys and values of a layer share one; "kinds": all keys one and all values one
    cache_options: "Callable[[CacheFormats], str]" = _no_options  # options of `command` for cache formats

    def serving(self, folder: str, cache: "CacheFormats | None" = None) -> str:
        """The command that serves a folder, with keys and values in these formats; "" where there is none."""
        options = self.cache_options(cache) if cache is not None else ""
        return self.command.format(folder=folder) + options if self.command else ""

    def refusal(self, layer: "Layer", scheme: "Scheme") -> str:
        """Why a layer cannot have a scheme, in half a sentence, mixes considered; "" when it can."""
        if scheme.mix is not None and not self.mixes:
            return "all rows of a layer have one format there"
        return self.objection(layer, scheme)


@dataclass(frozen=True)
class Rounding(Entry):
    """A rounding method: `function(weight, format, second_moment)` gives a Quantized."""

    second_moment: bool = False  # needs the second moment sum(x x^T) of the layer's inputs


E = TypeVar("E", bound=Entry)


class Registry(Mapping[str, E], Generic[E]):
    """Entries by name, in order. Iteration yields the package's own names; `named` also finds plugins.

    >>> Registry(Search, "search", "mpq.searches", [Search("best", "builtins:max")]).named("best")([1, 2])
    2
    """

    def __init__(
        self, kind: type[E], what: str, group: str, entries: list[E], former: Mapping[str, str] | None = None
    ) -> None:
        self.kind, self.what, self.group = kind, what, group
        self.former = dict(former or {})  # names of entries in version 0.1, with what they are called now
        self.entries = {entry.name: entry for entry in entries}

    def __getitem__(self, name: str) -> E:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, entry in self.entries.items() if not entry.family)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def named(self, name: str) -> E:
        """The entry called `name`, a member of a family ("proxy:FORMULA"), or a plugin's.

        Raises:
            MpqError: an unknown name (with the nearest), or a plugin that cannot be imported.
        """
        expect(name, str, f"the name of a {self.what}")
        if name in self.former:
            new = self.former[name]
            warnings.warn(f"the {self.what} {name!r} is {new!r} now; the old name goes in version 0.2", stacklevel=2)
            return self.entries[new]
        if name in self.names():
            return self.entries[name]
        family, colon, text = name.partition(":")
        if colon and family in self.entries and self.entries[family].family:
            entry = self.entries[family]
            return replace(entry, name=name, function=entry.load()(text), family=False)
        plugins = plugins_of(self.group)
        if name not in plugins:
            raise MpqError(f"unknown {self.what} {name!r}: {nearest_names(name, [*self, *plugins])}")
        loaded = load_plugin(plugins[name])
        return (
            loaded if isinstance(loaded, self.kind) else self.kind(name, loaded, (loaded.__doc__ or "").split("\n")[0])
        )

    def names(self, **flags: bool) -> tuple[str, ...]:
        """The package's own names whose flags have these values: `names(measured=True)`."""
        return tuple(
            name for name in self if all(getattr(self.entries[name], flag) == value for flag, value in flags.items())
        )

    def markdown(self) -> str:
        """The table of names in Markdown, for README and documentation."""
        rows = [f"| `{entry.name}{':...' * entry.family}` | {entry.doc} |" for entry in self.entries.values()]
        return "\n".join(["| name | what it is |", "|---|---|", *rows])

    def help(self) -> str:
        """The table of names as text, for `--help`."""
        width = max(map(len, self.entries))
        return "\n".join(f"  {entry.name.ljust(width)}  {entry.doc}" for entry in self.entries.values())


def plugins_of(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group, by name; nothing is imported."""
    return {point.name: point for point in entry_points(group=group)}


def load_plugin(point: EntryPoint) -> Any:
    """Import what an entry point names; MpqError when that fails."""
    try:
        return point.load()
    except Exception as error:
        raise MpqError(f"the plugin {point.name} ({point.value}) cannot be imported: {error}") from error
