"""Where the `generate()` of an enabled model goes another way than that of others."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from typing_extensions import override

from hf_paged._transformers import cache_in, is_synced
from hf_paged.cache.paged import PagedCache
from hf_paged.decoding.passes import shows_passes
from hf_paged.decoding.sample import sample
from hf_paged.decoding.surplus import sequences_of
from hf_paged.enabling.state import STATES


class _Context:
    """What an enabled model is beside what it was: a context that disables it at the end."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        from hf_paged.enabling.api import disable  # which needs this module

        model: Any = self
        disable(model)

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        # What was enabled is this object alone, so a copy, or what is pickled, is of the class that it was.
        model: Any = self
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        return _new, (original_class(model),), *reduced[2:]


class _Generating(_Context):
    """Methods that `generate()` calls of a model."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        model: Any = self
        state = STATES.get(model)
        if state is not None:
            state.give_cache(model, generation_config, model_kwargs)
        parent: Any = super()
        return parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        model: Any = self
        state, cache = STATES.get(model), cache_in(model_kwargs)
        options = {"synced_gpus": synced_gpus, "streamer": streamer}
        parent: Any = super()
        if state is None or sequences_of(cache) is None or synced_gpus or is_synced(model):
            return parent._sample(
                input_ids, logits_processor, stopping_criteria, generation_config, **options, **model_kwargs
            )
        state.notes["loop"] = "hf_paged.sample"
        with state.decoding(model, generation_config) as watching:
            watching += state.releasing(cache, generation_config, input_ids)
            criteria = StoppingCriteriaList([*stopping_criteria, *watching])
            return sample(
                model,
                input_ids,
                logits_processor,
                criteria,
                generation_config,
                **options,
                packs_prompt=True,
                **model_kwargs,
            )

    def _beam_search(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        model: Any = self
        state, cache = STATES.get(model), cache_in(kwargs)
        parent: Any = super()
        if state is not None:
            state.notes["compiled"] = "no, as generate() compiles no beams"
            inputs = {name: value for name, value in kwargs.items() if name != "synced_gpus"}
            if isinstance(cache, PagedCache) and not shows_passes(generation_config):
                cache._prefill_prepared(model, input_ids, inputs, packs=True)
        return parent._beam_search(
            input_ids, logits_processor, stopping_criteria, generation_config=generation_config, **kwargs
        )


@cache
def enabled_class(original: Any, *, generates: bool) -> Any:
    """The class of enabled models of another class; it has the same name.

    Args:
        original: the other class.
        generates: whether these models generate; else they wrap one that does.
    """
    bases = (_Generating if generates else _Context, original)
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, bases, names)


def original_class(model: torch.nn.Module) -> type[torch.nn.Module]:
    """The class that a model had before it was enabled."""
    kinds: tuple[Any, ...] = type(model).__mro__
    original: type[torch.nn.Module] = kinds[kinds.index(_Context) + 1] if _Context in kinds else kinds[0]
    return original


def _new(kind: Any) -> Any:
    return kind.__new__(kind)
