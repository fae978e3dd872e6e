"""A value of a JSON file from outside: whoever takes it out says what it must be, and the error where it is not so."""

import json
import reprlib
from dataclasses import dataclass
from typing import Any

TOP = "content"


@dataclass(frozen=True)
class Node:
    """A value, and its place in the file. Every method raises ValueError where it is something else."""

    value: Any
    """As JSON has it."""
    where: str = TOP
    """As in `layers[3].mlp`."""

    def __getitem__(self, key: str) -> "Node":
        """An entry of an object."""
        if key not in self._of(dict):
            raise ValueError(f"its {self.where} lacks {key}")
        return Node(self.value[key], key if self.where == TOP else f"{self.where}.{key}")

    def get(self, key: str) -> "Node | None":
        """An entry of an object; None where it is null or not there."""
        return None if self._of(dict).get(key) is None else self[key]

    def entries(self) -> "dict[str, Node]":
        """An object."""
        return {key: self[key] for key in self._of(dict)}

    def items(self, count: int | None = None) -> "list[Node]":
        """A list, of so many where that is said."""
        return [Node(value, f"{self.where}[{index}]") for index, value in enumerate(self._list(count))]

    def text(self) -> str:
        """A text."""
        return self._of(str)

    def whole(self, low: int, high: int) -> int:
        """A whole number within these bounds."""
        self.need(_within(self.value, low, high, (int,)))
        return self.value

    def number(self, low: float, high: float) -> float:
        """A number within these bounds."""
        self.need(_within(self.value, low, high))
        return self.value

    def wholes(self, low: int, high: int) -> list[int]:
        """A list of at least one whole number within these bounds."""
        self.need(self.value != [])
        if all(_within(value, low, high, (int,)) for value in self._list()):
            return self.value
        return [item.whole(low, high) for item in self.items()]  # says which is wrong

    def numbers(self, low: float, high: float, count: int) -> list[float]:
        """A list of so many numbers within these bounds."""
        if all(_within(value, low, high) for value in self._list(count)):
            return self.value
        return [item.number(low, high) for item in self.items()]  # says which is wrong

    def need(self, right: bool) -> None:
        """Refuse a value that is not right."""
        if not right:
            raise ValueError(f"its {self.where} is {reprlib.repr(self.value)}")

    def _of(self, kind: type) -> Any:
        self.need(isinstance(self.value, kind))
        return self.value

    def _list(self, count: int | None = None) -> list[Any]:
        found = self._of(list)
        if count is not None and len(found) != count:
            raise ValueError(f"its {self.where} has {len(found)} entries where {count} belong")
        return found


def parse(text: str) -> Node:
    """The content of a file."""
    return Node(json.loads(text))


def _within(value: Any, low: float, high: float, kinds: tuple[type, ...] = (int, float)) -> bool:
    """Not so of what is neither finite nor a number, such as True."""
    return type(value) in kinds and low <= value <= high
