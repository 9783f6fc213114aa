"""The scenarios: a file each, and a line of this list."""

from hf_paged.tools.bench.scenarios import attention, beam, growing, latency, many, mixed, prefix, speculate
from hf_paged.tools.bench.scenarios.inside import ablation, compile, host, profile

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        latency.LATENCY,
        growing.SINGLE,
        mixed.MIXED,
        growing.CHAT,
        beam.BEAM,
        prefix.PREFIX,
        many.MANY,
        many.MANY_ALIKE,
        many.MANY_SHORT,
        speculate.SPECULATE,
        mixed.PAGE_SIZE,
        profile.PROFILE,
        attention.ATTENTION,
        host.ALLOCATOR,
        host.PLAN,
        compile.COMPILE,
        ablation.ABLATION,
    )
}
"""By name."""
