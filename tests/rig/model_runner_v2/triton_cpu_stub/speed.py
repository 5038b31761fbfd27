"""Leave out what Triton's interpreter does over and over without an effect on results.

It prepares `triton.language` again for every launch and for every call of a device function, and
computes each sum and product of integers twice, to find overflows. Both take half of a step.
"""

from dataclasses import replace

from triton.runtime import interpreter


class _Index(int):
    """A loop's counter, which compiled code has as a tensor and the interpreter as a number."""

    def to(self, dtype: object) -> "_Index":
        return self


class _Kept:
    """Stands for a scope of patches that stays."""

    def restore(self) -> None:
        pass


def patch_once() -> None:
    if getattr(interpreter, "patches_once", False):
        return
    interpreter.patches_once = True
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch, languages = interpreter._patch_lang, {id(interpreter.tl), id(interpreter.tl.core)}
    prepared: set[frozenset[int]] = set()

    def patch_lang(fn: object) -> _Kept:
        modules = frozenset(map(id, fn.__globals__.values())) & languages
        if modules not in prepared:
            patch(fn)
            counted = interpreter.tl.range
            interpreter.tl.range = lambda *a, **k: map(_Index, counted(*a, **k))
            prepared.add(modules)
        return _Kept()

    interpreter._patch_lang = patch_lang
