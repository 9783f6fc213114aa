"""The two functions of `"paged_flex"`, and what they tell the backends."""
