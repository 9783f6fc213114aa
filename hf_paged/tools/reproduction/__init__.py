"""The evaluation of "Paged Attention Meets FlexAttention" (Joshi et al., 2025), run again with this package.

How: `hf-paged reproduce`. Each stage is a command of `hf-paged` with its own results file; the page comes from these.
"""
