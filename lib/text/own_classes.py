"""What Auto classes of tokenizers and processors are told of a user's own classes."""

from __future__ import annotations

from typing import Any, ClassVar


class OwnClasses:
    """Types of a user's own: what the files call them, and the class that opens them."""

    _classes: ClassVar[dict[str, Any]]

    @classmethod
    def register(cls, name: str | type, own: Any = None, fast: Any = None, *, exist_ok: bool = True) -> None:
        """Makes a class of your own known.

        Args:
            name: what checkpoints' files call it, or a model type, for files that name no type; or a configuration
                class, which stands for its model type and the name of the class that is registered.
            own: a class with `from_pretrained(folder, **settings)`; what it makes is returned as it is.
            fast: another that takes its place, where transformers has two of a kind.
            exist_ok: whether it may take the place of one that was registered before.

        Raises:
            ValueError: no such class, or a name that is taken.
        """
        own = own if fast is None else fast
        if not callable(getattr(own, "from_pretrained", None)):
            raise ValueError(f"{own!r} has no from_pretrained, which {cls.__name__} calls")
        names = [name] if isinstance(name, str) else [getattr(name, "model_type", None), own.__name__]
        if not names[0] or not isinstance(names[0], str):
            raise ValueError(
                f"{cls.__name__}.register needs a name or a configuration class with a model_type, got {name!r}"
            )
        if not exist_ok and (taken := [one for one in names if cls._classes.get(one, own) is not own]):
            raise ValueError(f"{cls.__name__} has a class for {taken[0]!r}: {cls._classes[taken[0]]!r}")
        cls._classes.update(dict.fromkeys(names, own))
