"""Finds every problem of raw configuration values and says each in one line.

Fields are validated one by one, not as a whole model: pydantic leaves out what reads several
fields as soon as one field is wrong, and the user would meet his problems one after the other.
"""

from collections.abc import Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from train.settings.remedies import did_you_mean
from train.settings.rules import broken_rules
from train.settings.units import shown


class ConfigError(ValueError):
    """Every problem of a configuration: a header, then one line for each.

    Attributes:
        problems: the lines, without the header and the indentation.
    """

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        # a line break inside a quoted key would make two lines of one problem
        self.problems = tuple(" ".join(problem.splitlines()) for problem in problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) != 1 else "")
        super().__init__("\n".join([f"{source}: {count}", *(f"  {p}" for p in self.problems)]))


def values_of(root: type[BaseModel], raw: Mapping[str, object]) -> dict[str, object]:
    """Return each valid field of raw values by its dotted path, as rules name it (broken_rules)."""
    look = _Examination(root)
    look.at_section(root, raw, _Where("", "", ""))
    return dict(look.values)


def find_problems(
    root: type[BaseModel], raw: Mapping[str, object], world_size: int | None
) -> list[str]:
    """Return a line for each problem of raw values for the model `root`."""
    look = _Examination(root)
    look.at_section(root, raw, _Where("", "", ""))
    rules = broken_rules({**look.values, "world_size": world_size})
    return look.problems + [f"{look.shown.get(path, path)}: {message}" for path, message in rules]


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a field holds or may hold, None for a value or a union."""
    kind: Any = field.annotation
    if get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind):
        kinds = [part for part in get_args(kind) if part is not NoneType]
        kind = kinds[0] if len(kinds) == 1 else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def union_members(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """Return the sections of a field that is a union told apart by `name`, {} for others."""
    return {
        tag: member
        for member in _alternatives(field.annotation)
        if "name" in member.model_fields
        for tag in get_args(member.model_fields["name"].annotation)
    }


def _alternatives(kind: object) -> Iterator[type[BaseModel]]:
    """Yield the sections that a union, of unions even, is made of; none of a section itself."""
    for part in () if get_origin(kind) in (tuple, Literal) else get_args(kind):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part
        else:
            yield from _alternatives(part)


def _items_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section of each item of a field that is, or may be, a list of them."""
    kinds = get_args(field.annotation) if _may_be_value(field) else (field.annotation,)
    for kind in kinds:
        item = get_args(kind)[0] if get_origin(kind) is tuple else None
        if isinstance(item, type) and issubclass(item, BaseModel):
            return item
    return None


def _may_be_value(field: FieldInfo) -> bool:
    """Return whether a field takes one of several kinds, such as a path or a list."""
    return get_origin(field.annotation) in (Union, UnionType)


def _value_kind(field: FieldInfo) -> Any:
    """Return what a field takes that is not a list of sections."""
    if _items_of(field) is None or not _may_be_value(field):
        return field.annotation
    kinds = [kind for kind in get_args(field.annotation) if get_origin(kind) is not tuple]
    return kinds[0] if len(kinds) == 1 else Union[tuple(kinds)]  # noqa: UP007


class _Where(NamedTuple):
    """Where a section is, each as the beginning of its keys' dotted paths."""

    shown: str  # as a problem says it: model.memory.
    rules: str  # as rules name it: model.memory.fam.
    places: str  # without names and numbers: model.memory.

    def below(self, name: str) -> "_Where":
        """Return where the section at a key is."""
        return _Where(*(f"{path}{name}." for path in self))


class _Examination:
    """A walk over raw values that collects valid fields, by rules' paths, and problem lines."""

    def __init__(self, root: type[BaseModel]) -> None:
        self.values: dict[str, object] = {}
        self.shown: dict[str, str] = {}  # how a problem says a rule's path, where otherwise
        self.problems: list[str] = []
        # for a key in the wrong place: where it lives, the first place winning
        self.places: dict[str, _Place] = {}
        for place in _places(root, "", ""):
            name = place.path.rpartition(".")[2]
            known = self.places.setdefault(name, place)
            if known.path == place.path and place.members not in ((), known.members):
                members = (*known.members, *place.members)
                self.places[name] = known._replace(members=members)

    def at_section(self, section: type[BaseModel], raw: Mapping[str, object], at: _Where) -> None:
        for name, field in section.model_fields.items():
            inner, item = section_of(field), _items_of(field)
            self.shown[at.rules + name] = at.shown + name
            if inner is not None and field.default is None and raw.get(name) is None:
                self.values[at.rules + name] = None  # a section that may be left out, and is
            elif inner is not None:
                self.at_inner(inner, raw.get(name), at.below(name))
            elif union_members(field):
                self.at_union(field, raw.get(name), at.shown + name)
            elif name in raw:
                listed = isinstance(raw[name], list | tuple) or not _may_be_value(field)
                if item is None or not listed or self.at_items(item, raw[name], at.below(name)):
                    self.at_field(field, raw[name], at, name)
            elif field.is_required():
                self.problems.append(f"{at.shown}{name}: missing; {_first_sentence(field)}")
            elif not field.default_factory_takes_validated_data:
                # (a default made from other fields, run_dir, is read by no rule)
                self.values[at.rules + name] = field.get_default(call_default_factory=True)
        for key in raw:
            if key not in section.model_fields:
                self.problems.append(self.unknown_key(section, at, str(key)))

    def at_inner(self, section: type[BaseModel], value: object, at: _Where) -> None:
        # a section left out, or with every key commented out, has its fields' defaults
        if value is None:
            value = {}
        if isinstance(value, Mapping):
            self.at_section(section, value, at)
        else:
            self.problems.append(f"{at.shown[:-1]}: expected keys below it, got {shown(value)}")

    def at_items(self, section: type[BaseModel], value: object, at: _Where) -> bool:
        """Look at each section of a list; return whether all is well."""
        before, where = len(self.problems), at.shown[:-1]
        if not isinstance(value, list | tuple):
            keys = ", ".join(f"{key}: .." for key in section.model_fields)
            self.problems.append(
                f"{where}: expected a list such as [{{{keys}}}], got {shown(value)}"
            )
            return False
        for number, item in enumerate(value):
            path = f"{where}[{number}]."
            self.at_inner(section, item, _Where(path, path, at.places))
        return len(self.problems) == before

    def at_union(self, field: FieldInfo, value: object, where: str) -> None:
        """Look at a section told apart by `name`, or a list of them.

        Rules name its keys by its name (model.memory.fam.slots), and so do problems in a list.
        """
        members, before = union_members(field), len(self.problems)
        if value is None:
            value = field.get_default(call_default_factory=True).model_dump()
        if isinstance(value, list | tuple):
            for number, item in enumerate(value):
                self.at_member(members, item, where, f"{where}[{number}]", listed=True)
        else:
            self.at_member(members, value, where, where, listed=False)
        if len(self.problems) == before:
            kind: Any = field.annotation
            self.values[where] = TypeAdapter(kind).validate_python(value)

    def at_member(
        self,
        members: Mapping[str, type[BaseModel]],
        value: object,
        where: str,
        path: str,
        *,
        listed: bool,
    ) -> None:
        if isinstance(value, str):  # a bare name stands for its keys
            value = {"name": value}
        if not isinstance(value, Mapping):
            some = "a name or keys" if listed else "a name, keys below it or a list of these"
            self.problems.append(f"{path}: expected {some}, got {shown(value)}")
        elif "name" not in value:
            self.problems.append(f"{path}.name: missing; one of {', '.join(members)}")
        elif not isinstance(value["name"], str) or value["name"] not in members:
            self.problems.append(f"{path}.name: {_not_one_of(value['name'], members)}")
        else:
            name = value["name"]
            inside = f"{where}.{name}."
            at = _Where(inside if listed else f"{where}.", inside, f"{where}.")
            self.at_section(members[name], value, at)

    def at_field(self, field: FieldInfo, value: object, at: _Where, name: str) -> None:
        where = at.shown + name
        if isinstance(value, Mapping):
            self.problems += [
                f"{where}.{key}: unknown key; {where} is a value and has no keys" for key in value
            ]
            return
        rules = tuple(field.metadata)
        listed = isinstance(value, list | tuple)
        plain: Any = field.annotation if listed else _value_kind(field)
        kind: Any = Annotated[(plain, *rules)] if rules else plain
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        try:
            self.values[at.rules + name] = adapter.validate_python(value)
        except ValidationError as error:
            details = error.errors(include_url=False)[0]
            self.problems.append(f"{where}: {_message(details, field, value)}")

    def unknown_key(self, section: type[BaseModel], at: _Where, key: str) -> str:
        place = self.places.get(key)
        if place is not None and place.path == at.places + key:
            *most, last = place.members
            names = f"{', '.join(most)} or {last}" if most else last
            hint = f"; only name={names} has it"
        elif place is not None:
            hint = f"; did you mean {place.path!r}?"
        else:
            known = ", ".join(section.model_fields)
            hint = did_you_mean(key, section.model_fields) or f"; known here: {known}"
        return f"{at.shown}{key}: unknown key{hint}"


class _Place(NamedTuple):
    path: str
    members: tuple[str, ...]  # the union members that have it, () outside a union


def _places(section: type[BaseModel], path: str, member: str) -> Iterator[_Place]:
    """Yield the place of every key of a section, then of the sections below it."""
    below: list[tuple[type[BaseModel], str, str]] = []
    for name, field in section.model_fields.items():
        where = path + name
        if (inner := section_of(field)) is not None:
            below.append((inner, where + ".", ""))
        elif members := union_members(field):
            below += [(found, where + ".", tag) for tag, found in members.items()]
        else:
            yield _Place(where, (member,) if member else ())
    for arguments in below:
        yield from _places(*arguments)


def _first_sentence(field: FieldInfo) -> str:
    """Return what a missing field is for, as a problem line ends."""
    sentence = (field.description or "").split(". ")[0].split(": ")[0].rstrip(".")
    return sentence[:1].lower() + sentence[1:]


def _not_one_of(value: object, allowed: Iterable[object]) -> str:
    words = [str(word) for word in allowed]
    hint = did_you_mean(value, words) if isinstance(value, str) else ""
    return f"{shown(value)} is not one of {', '.join(words)}{hint}"


def _message(details: ErrorDetails, field: FieldInfo, given: object) -> str:
    """Return pydantic's finding about one field with value, limit and remedy."""
    value, context = shown(given), details.get("ctx", {})
    match details["type"]:
        case "value_error":  # ours, from train.settings.units
            return str(context["error"])
        case "literal_error":
            return _not_one_of(given, get_args(field.annotation))
        case "greater_than_equal":
            return f"{value} is too small; the least is {context['ge']:g}"
        case "greater_than":
            return f"{value} is too small; it must be above {context['gt']:g}"
        case "less_than_equal":
            return f"{value} is too large; the most is {context['le']:g}"
        case "less_than":
            return f"{value} is too large; it must be below {context['lt']:g}"
        case "bool_type" | "bool_parsing":
            return f"expected true or false, got {value}"
        case "string_type":
            return f"expected text, got {value}; write it in quotes if it is meant as text"
        case "path_type":
            return f"expected a path, got {value}"
        case "string_too_short":
            return f"{value} is empty; leave it out or give a value"
        case "string_pattern_mismatch":
            return (
                f"{value} is not a name; use letters, digits, '.', '_' and '-', and begin with"
                " a letter or digit"
            )
    return f"{details['msg']}, got {value}"
