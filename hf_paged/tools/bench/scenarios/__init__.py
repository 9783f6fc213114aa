"""The scenarios: a file each, and a line of this list."""

from hf_paged.tools.bench.scenarios import ablation, beam, compile, growing, host, latency, mixed, page_size, profile

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        latency.LATENCY,
        growing.SINGLE,
        mixed.MIXED,
        growing.CHAT,
        beam.BEAM,
        page_size.PAGE_SIZE,
        profile.PROFILE,
        host.ALLOCATOR,
        host.PLAN,
        compile.COMPILE,
        ablation.ABLATION,
    )
}
"""By name."""
