"""`python -m hf_paged` is `hf-paged`, for launchers that start modules."""

from hf_paged.tools.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
