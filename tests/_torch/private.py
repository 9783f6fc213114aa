"""torch as it might be one day: private names gone, or something else by the same names."""

from hf_paged._torch import inductor, private, surroundings, tricks


class Changed:
    """Fails at whatever is done with it."""

    def _fail(self, *arguments, **options):
        raise NotImplementedError("no longer what it was")

    __call__ = __enter__ = __exit__ = _fail

    def __getattr__(self, name):
        return self._fail()


def stand_in(monkeypatch, name, value):
    """Let a private name name something else."""
    monkeypatch.setattr(name, "_found", value)
    monkeypatch.setattr(name, "_error", None)
    monkeypatch.setattr(name, "_is_looked_up", True)


def lose(monkeypatch, names, changed=False):
    """Let private names be gone, or name something else, and forget what was found out about torch so far."""
    found = private.find

    def find(name):
        if name not in names:
            return found(name)
        if changed:
            return Changed()
        raise AttributeError("gone")

    monkeypatch.setattr(private, "find", find)
    forget(monkeypatch)


def forget(monkeypatch):
    """Let private names and tricks be looked at again, now and once the test is over."""
    for name in private.NAMES:
        for key, value in (("_found", None), ("_error", None), ("_is_looked_up", False)):
            monkeypatch.setattr(name, key, value)
    for trick in tricks.TRICKS.values():
        monkeypatch.setattr(trick, "_failure", None)
        if "_is_able" in vars(trick):
            monkeypatch.delitem(vars(trick), "_is_able")
    forget_caches()


def forget_caches():
    surroundings._surroundings.cache_clear()
    surroundings._profiler.cache_clear()
    inductor._has_cpp_compiler.cache_clear()
