"""`ray job submit --working-dir . -- python jobs/train.py CONFIG [section.field=value …]`."""

import sys

from clip_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
