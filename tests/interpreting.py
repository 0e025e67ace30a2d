"""Triton's interpreter, twice as fast: it patches its language once a launch, and not in every call of a function.

A launch patches the functions of `triton.language` and puts them back. The interpreter does so again whenever a kernel
calls a function, which finds nothing left to patch and takes two thirds of all time.
"""

from functools import cache


def patch_once_a_launch():
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, patched = getattr(interpreter, "_patch_lang", None), set()
    if not (patch and hasattr(interpreter, "_LangPatchScope")):
        return  # a Triton that does it in another way, in its own time

    @cache
    def languages(fn):
        """The modules that a function sees, which are what is patched for it."""
        return frozenset(m.__name__ for m in fn.__globals__.values() if m is tl or m is tl.core)

    def patch_lang(fn):
        scope = interpreter._LangPatchScope()
        if languages(fn) <= patched:
            return scope
        if patched:  # for a function inside of a launch; nobody puts that back, so it is noted for this launch only
            patch(fn)
        else:
            scope = patch(fn)
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.update(languages(fn))
        return scope

    interpreter._patch_lang = patch_lang
