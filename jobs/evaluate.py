"""`ray job submit --working-dir . -- python jobs/evaluate.py CONFIG [section.field=value …]`."""

import sys

from clip_ray.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
