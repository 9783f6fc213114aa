"""`enable`, `disable` and `explain`."""

import logging
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from hf_paged._transformers import layer_specs, model_in, not_a_model, obstacle, recurrent_layer
from hf_paged.attention.mask import NAME
from hf_paged.enabling.generation import enabled_class, original_class
from hf_paged.enabling.state import STATES, State
from hf_paged.pages.pool import PagePool, check_page_size

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=torch.nn.Module)


def enable(
    model: Model,
    *,
    compile: bool | str = "auto",
    prefix_cache: bool = True,
    pool: PagePool | None = None,
    page_size: int | None = None,
    memory_fraction: float | None = None,
) -> Model:
    """Let every `generate()` of a model use pages, whoever calls it.

    From now on the model computes attention by `"paged_flex"`, and `generate()` takes a new `PagedCache` in one pool
    where it is given no cache, computes prompts packed and through the prefix cache of the pool, decodes in
    `hf_paged.sample`, compiles where that pays, releases rows as they end, and gives the pages back at the end. It
    takes the same arguments and returns the same; what can't be done faster goes the plain way, and `explain(model)`
    says why. Nothing else is changed: this model object alone acts otherwise, by methods of its own.

    The model may be used as a context, which disables it: `with hf_paged.enable(model): ...`. A copy of it is not
    enabled.

    Args:
        model: one of Transformers, or one that wraps it, as PEFT's do.
        compile: whether steps are compiled. `"auto"`: on a GPU, and on a CPU once it has decoded for half a minute,
            which is what compiling takes.
        prefix_cache: whether prompts find what was computed of earlier ones that begin alike.
        pool: for the caches, which others may share; None: one is made for the first of them.
        page_size: tokens per page: 16, 32, 64, 128 or 256; None: 32 on a CPU, 128 elsewhere.
        memory_fraction: above 0 and below 1, of the memory that is free when the pool is made, that it takes. None:
            it grows as needed.

    Returns:
        The model itself.

    Raises:
        ValueError: for what is no model that generates, one that is enabled already, or arguments that exclude each
            other; nothing has changed.
    """
    inner = generating_model(model, "enable()")
    if inner in STATES:
        raise ValueError(
            f"This {type(model).__name__} is enabled already. Call hf_paged.disable(model) first to enable it with "
            "other settings."
        )
    if compile not in (True, False, "auto"):
        raise ValueError(f'compile={compile!r} was asked for; give True, False or "auto".')
    if pool is not None and (page_size is not None or memory_fraction is not None):
        raise ValueError(
            f"page_size={page_size} and memory_fraction={memory_fraction} were asked for beside a pool, which has "
            "them. Leave them out."
        )
    if page_size is not None:
        check_page_size(page_size)
    if memory_fraction is not None and not 0 < memory_fraction < 1:
        raise ValueError(f"memory_fraction={memory_fraction} was asked for; give one above 0 and below 1.")
    layers = layer_specs(inner.config)
    if pool is not None and pool.layers != layers:
        raise ValueError(
            f"The pool was made for a model with other layers than this {type(inner).__name__}. Make one by "
            "PagePool.from_model(model)."
        )
    reason = obstacle(inner)
    if reason:
        raise ValueError(
            f"{type(inner).__name__} can't be enabled, since {reason}. PagedCache.from_model(model) works with "
            'attn_implementation="eager" or "sdpa".'
        )
    state = State(_attention_of(inner), compile, prefix_cache, pool, page_size, memory_fraction)
    inner.set_attn_implementation(NAME)
    STATES[inner] = state
    _swap(inner, generates=True)
    if inner is not model:
        _swap(model, generates=False)
    return model


def disable(model: torch.nn.Module) -> None:
    """Undo `enable`: the model is as it was, and its pool is given up. A model that is not enabled stays as it is."""
    inner = generating_model(model, "disable()")
    state = STATES.pop(inner, None)
    if state is None:
        return
    for wrapper in (model, inner):
        wrapper.__class__ = original_class(wrapper)
    inner.set_attn_implementation(state.attention_before)


def explain(model: torch.nn.Module) -> str:
    """Say what the last `generate()` of an enabled model used, and what it did not and why.

    Raises:
        ValueError: if the model is not enabled.
    """
    inner = generating_model(model, "explain()")
    state = STATES.get(inner)
    if state is None:
        raise ValueError(f"This {type(model).__name__} is not enabled. Call hf_paged.enable(model) first.")
    pool = state.pool
    before = state.attention_before[""]
    lines = [f"{type(inner).__name__} is enabled, with {NAME!r} attention; before: {before!r}"]
    if pool is None:
        lines.append("pool: none yet")
    else:
        stats = pool.stats()
        lines.append(
            f"pool: {stats.num_pages} pages of {pool.page_size} tokens, {stats.reserved_bytes / 2**20:.1f} MiB; "
            f"{stats.num_active_pages} held, {stats.num_cached_pages} cached"
        )
        if pool.prefix_index is not None:
            lines.append(f"prefixes: {stats.num_hit_tokens} of {stats.num_looked_up_tokens} tokens were found so far")
        elif (layer := recurrent_layer(inner.config)) is not None:
            lines.append(f"prefixes: none are looked for, since {layer}")
    notes = [f"  {name}: {note}" for name, note in state.notes.items()]
    return "\n".join([*lines, "the last generate():", *(notes or ["  there was none yet"])])


def pool_for_prompts(model: torch.nn.Module) -> PagePool:
    """Return the pool of a model that is enabled; for any other a new one, as the model would have."""
    inner = generating_model(model, "pool_for_prompts()")
    state = STATES.get(inner) or State({}, False, True, None, None, None)
    return state.new_cache(inner).pool


def generating_model(model: Any, asker: str) -> PreTrainedModel:
    """Return the model that generates, of one that may wrap it.

    Args:
        model: that one.
        asker: who wants it, as in "enable()".

    Raises:
        ValueError: if it is none that generates.
    """
    inner: Any = model_in(model, asker)
    while not isinstance(inner, PreTrainedModel):  # but hands on what is asked of it, as PEFT's and torch.compile's
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
            continue
        wrapped = [getattr(inner, name, None) for name in ("_orig_mod", "module")]  # torch's
        inner = next((part for part in wrapped if isinstance(part, torch.nn.Module)), None)
        if inner is None:
            raise not_a_model(model, asker)
    if getattr(inner, "generation_config", None) is None:
        raise ValueError(
            f"A {type(inner).__name__} was given, which has no generate(). Pass a model for generation, such as one "
            "of AutoModelForCausalLM."
        )
    return inner


def _swap(model: Any, generates: bool) -> None:
    kind: Any = type(model)
    model.__class__ = enabled_class(kind, generates=generates)


def _attention_of(model: PreTrainedModel) -> dict[str, str]:
    config = model.config
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    own = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {"": config._attn_implementation} | own
