"""`python -m clip_ray` is the `clip-ray` command."""

from clip_ray.cli import main

if __name__ == "__main__":
    main()
