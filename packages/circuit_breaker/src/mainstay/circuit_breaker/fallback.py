"""Something else instead of an error."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from math import inf
from typing import Any, Final, cast

from mainstay.circuit_breaker._checks import is_async, is_number, is_whole, refuse_unfinished, require, require_plain
from mainstay.circuit_breaker._verdicts import are_exceptions
from mainstay.circuit_breaker.errors import WrongKind
from mainstay.circuit_breaker.policy import Layer, Policy
from mainstay.core import SYSTEM_CLOCK, Clock

__all__ = ["Fallback"]

_NOTHING: Final = object()


class Fallback(Policy):
    """Answer with something else when the call fails, rejections included.

    Tried in this order: the last good result for the same key, if it is young enough; `function`; `value`. Where none
    applies the error stands.

    Args:
        value: the answer.
        function: makes the answer: `function(error, *args, **kwargs)`, plain or (for async callers) async.
        last_good_seconds: how old the last good result may be. > 0
        key: says from the call's arguments whose result may stand in: `key=lambda customer_id: customer_id`. Needed
            with `last_good_seconds`: the last answer to another question is no answer.
        max_keys: how many last good results are kept; the one not renewed for longest makes room. >= 1
        on: exceptions that are answered. A cancellation never is.
        clock: measures age; tests pass a `VirtualClock`.

    Raises:
        ValueError: nothing to fall back to, or a number out of its range.
        TypeError: `on` holds something that is no Exception class, `function` is not callable, or `key` is no plain
            function.
    """

    def __init__(
        self,
        *,
        value: object = _NOTHING,
        function: Callable[..., Any] | None = None,
        last_good_seconds: float | None = None,
        key: Callable[..., Hashable] | None = None,
        max_keys: int = 1000,
        on: tuple[type[Exception], ...] = (Exception,),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if value is _NOTHING and function is None and last_good_seconds is None:
            msg = "Fallback() has nothing to fall back to: give value=, function=, or last_good_seconds= with key="
            raise ValueError(msg)
        if (last_good_seconds is None) != (key is None):
            msg = "Fallback: last_good_seconds and key go together: the key says whose last result may stand in"
            raise ValueError(msg)
        if key is not None:
            require_plain("Fallback", "key", key)
        if function is not None and not callable(cast("object", function)):
            msg = f"Fallback: function is {function!r}; it is called as function(error, *args, **kwargs)"
            raise TypeError(msg)
        age = last_good_seconds
        in_range = age is None or (is_number(age) and 0 < age < inf)
        require("Fallback", "last_good_seconds", age, "a number, more than 0", holds=in_range)
        in_range = is_whole(max_keys) and max_keys >= 1
        require("Fallback", "max_keys", max_keys, "an integer, 1 or more", holds=in_range)
        if not are_exceptions(on):
            msg = f"Fallback: on is a tuple of Exception classes, not {on!r}"
            raise TypeError(msg)
        self.on = on
        self.used = 0
        self.clock = clock
        self._value = value
        self._function = function
        self._last_good_seconds = last_good_seconds
        self._key = key
        self._max_keys = max_keys
        self._good: OrderedDict[Hashable, tuple[float, object]] = OrderedDict()
        self._lock = threading.Lock()
        self._awaits = function is not None and is_async(function)

    def __repr__(self) -> str:
        return f"<Fallback used {self.used} times>"

    def _remember(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: object) -> None:
        """Keep a good result."""
        assert self._key is not None  # noqa: S101  the layer has this line only with a key
        key = self._key(*args, **kwargs)
        with self._lock:
            self._good[key] = self.clock.monotonic(), result
            self._good.move_to_end(key)
            if len(self._good) > self._max_keys:
                self._good.popitem(last=False)

    def _instead(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer instead of `error`; `_NOTHING` if it has none, and the error stands."""
        if isinstance(error, WrongKind):
            return _NOTHING
        self.used += 1
        if self._key is not None and self._last_good_seconds is not None:
            at, result = self._good.get(self._key(*args, **kwargs), (-inf, None))
            if self.clock.monotonic() - at <= self._last_good_seconds:
                return result
        if self._function is not None:
            answer = self._function(error, *args, **kwargs)
            if not self._awaits:
                refuse_unfinished(answer)
            return answer
        if self._value is _NOTHING:
            self.used -= 1
        return self._value

    async def _instead_awaited(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`instead`, where `function` is async."""
        answer = self._instead(error, args, kwargs)
        return await answer if inspect.iscoroutine(answer) else answer

    def _layers(self) -> tuple[Layer, ...]:
        names: dict[str, object] = {
            "on": self.on,
            "nothing": _NOTHING,
            "instead": self._instead_awaited if self._awaits else self._instead,
            "remember": self._remember,
        }
        kind = "async_fallback" if self._awaits else "fallback"
        return (Layer(kind, (self._awaits, self._key is not None), self, names),)
